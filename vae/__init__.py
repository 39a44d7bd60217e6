"""Train, fine-tune and measure Stable-Diffusion-style KL autoencoders.

The names below are the public API; each is imported when first used, so that `import vae` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae.checkpoints import load_autoencoder, save_autoencoder
    from vae.config import EvaluateConfig
    from vae.data.config import DataConfig
    from vae.data.images import open_image
    from vae.data.sources import Source
    from vae.door import compose
    from vae.evaluation.run import evaluate
    from vae.evaluation.tuned import compare_with_init
    from vae.exploring.ablating import ablate_channels
    from vae.exploring.interpolating import interpolate
    from vae.exploring.prior import sample_prior
    from vae.exploring.restoring import add_noise, mask_blocks, restore
    from vae.exploring.varying import vary
    from vae.latents import LatentStatistics, scale_latents, unscale_latents
    from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL
    from vae.models.lpips import LPIPS
    from vae.models.posterior import DiagonalGaussian
    from vae.models.strips import decode_in_strips, encode_in_strips
    from vae.models.tiny import AutoencoderTiny
    from vae.preparing.cached import LatentShards
    from vae.training.run import train

__version__ = "0.1.0"

_HOMES = {
    "AutoencoderConfig": "vae.models.autoencoder",
    "AutoencoderKL": "vae.models.autoencoder",
    "AutoencoderTiny": "vae.models.tiny",
    "DataConfig": "vae.data.config",
    "DiagonalGaussian": "vae.models.posterior",
    "LPIPS": "vae.models.lpips",
    "LatentShards": "vae.preparing.cached",
    "LatentStatistics": "vae.latents",
    "Source": "vae.data.sources",
    "EvaluateConfig": "vae.config",
    "ablate_channels": "vae.exploring.ablating",
    "add_noise": "vae.exploring.restoring",
    "compare_with_init": "vae.evaluation.tuned",
    "compose": "vae.door",
    "decode_in_strips": "vae.models.strips",
    "encode_in_strips": "vae.models.strips",
    "evaluate": "vae.evaluation.run",
    "interpolate": "vae.exploring.interpolating",
    "load_autoencoder": "vae.checkpoints",
    "mask_blocks": "vae.exploring.restoring",
    "open_image": "vae.data.images",
    "restore": "vae.exploring.restoring",
    "sample_prior": "vae.exploring.prior",
    "save_autoencoder": "vae.checkpoints",
    "scale_latents": "vae.latents",
    "train": "vae.training.run",
    "unscale_latents": "vae.latents",
    "vary": "vae.exploring.varying",
}

__all__ = [
    "LPIPS",
    "AutoencoderConfig",
    "AutoencoderKL",
    "AutoencoderTiny",
    "DataConfig",
    "DiagonalGaussian",
    "EvaluateConfig",
    "LatentShards",
    "LatentStatistics",
    "Source",
    "ablate_channels",
    "add_noise",
    "compare_with_init",
    "compose",
    "decode_in_strips",
    "encode_in_strips",
    "evaluate",
    "interpolate",
    "load_autoencoder",
    "mask_blocks",
    "open_image",
    "restore",
    "sample_prior",
    "save_autoencoder",
    "scale_latents",
    "train",
    "unscale_latents",
    "vary",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
