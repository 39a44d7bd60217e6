"""Train, fine-tune and measure Stable-Diffusion-style KL autoencoders.

The names below are the public API; each is imported when first used, so that `import vae` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae.checkpoints import load_autoencoder, save_autoencoder
    from vae.config import EvaluateConfig
    from vae.data.images import open_image
    from vae.data.sources import Source
    from vae.door import compose
    from vae.evaluation.run import evaluate
    from vae.latents import LatentStatistics, scale_latents, unscale_latents
    from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL
    from vae.models.lpips import LPIPS
    from vae.models.posterior import DiagonalGaussian
    from vae.models.strips import decode_in_strips, encode_in_strips
    from vae.preparing.cached import LatentShards
    from vae.training.run import train

__version__ = "0.1.0"

_HOMES = {
    "AutoencoderConfig": "vae.models.autoencoder",
    "AutoencoderKL": "vae.models.autoencoder",
    "DiagonalGaussian": "vae.models.posterior",
    "LPIPS": "vae.models.lpips",
    "LatentShards": "vae.preparing.cached",
    "LatentStatistics": "vae.latents",
    "Source": "vae.data.sources",
    "EvaluateConfig": "vae.config",
    "compose": "vae.door",
    "decode_in_strips": "vae.models.strips",
    "encode_in_strips": "vae.models.strips",
    "evaluate": "vae.evaluation.run",
    "load_autoencoder": "vae.checkpoints",
    "open_image": "vae.data.images",
    "save_autoencoder": "vae.checkpoints",
    "scale_latents": "vae.latents",
    "train": "vae.training.run",
    "unscale_latents": "vae.latents",
}

__all__ = [
    "LPIPS",
    "AutoencoderConfig",
    "AutoencoderKL",
    "DiagonalGaussian",
    "EvaluateConfig",
    "LatentShards",
    "LatentStatistics",
    "Source",
    "compose",
    "decode_in_strips",
    "encode_in_strips",
    "evaluate",
    "load_autoencoder",
    "open_image",
    "save_autoencoder",
    "scale_latents",
    "train",
    "unscale_latents",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
