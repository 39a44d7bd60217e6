"""Train, fine-tune and measure Stable-Diffusion-style KL autoencoders.

The names below are the public API; each is imported when first used, so that `import vae` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae.config.compose import compose
    from vae.config.data import DataConfig
    from vae.config.model import AutoencoderConfig
    from vae.config.schema import EvaluateConfig
    from vae.data.decode import open_image
    from vae.data.sources import Source
    from vae.datasets.cache_latents import LatentShards
    from vae.evaluation.after_training import compare_with_init
    from vae.evaluation.evaluate import evaluate
    from vae.explore import ablate_channels, add_noise, interpolate, mask_blocks, restore, sample_prior, vary
    from vae.latents import LatentStatistics, scale_latents, unscale_latents
    from vae.models.autoencoder_kl import AutoencoderKL
    from vae.models.autoencoder_tiny import AutoencoderTiny
    from vae.models.lpips import LPIPS
    from vae.models.posterior import DiagonalGaussian
    from vae.models.strips import decode_in_strips, encode_in_strips
    from vae.training.train import train
    from vae.weights import load_autoencoder, save_autoencoder


__version__ = "0.1.0"

_HOMES = {
    "AutoencoderConfig": "vae.models.autoencoder_kl",
    "AutoencoderKL": "vae.models.autoencoder_kl",
    "AutoencoderTiny": "vae.models.autoencoder_tiny",
    "DataConfig": "vae.config.data",
    "DiagonalGaussian": "vae.models.posterior",
    "LPIPS": "vae.models.lpips",
    "LatentShards": "vae.datasets.cache_latents",
    "LatentStatistics": "vae.latents",
    "Source": "vae.data.sources",
    "EvaluateConfig": "vae.config.schema",
    "ablate_channels": "vae.explore",
    "add_noise": "vae.explore",
    "compare_with_init": "vae.evaluation.after_training",
    "compose": "vae.config.compose",
    "decode_in_strips": "vae.models.strips",
    "encode_in_strips": "vae.models.strips",
    "evaluate": "vae.evaluation.evaluate",
    "interpolate": "vae.explore",
    "load_autoencoder": "vae.weights",
    "mask_blocks": "vae.explore",
    "open_image": "vae.data.decode",
    "restore": "vae.explore",
    "sample_prior": "vae.explore",
    "save_autoencoder": "vae.weights",
    "scale_latents": "vae.latents",
    "train": "vae.training.train",
    "unscale_latents": "vae.latents",
    "vary": "vae.explore",
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
