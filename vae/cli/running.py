"""A model run as a command asks: whole, or in strips within a bound of memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vae.errors import InputError, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vae.models.autoencoder_config import AutoencoderConfig
    from vae.models.interface import Autoencoder
    from vae.models.posterior import DiagonalGaussian

Advance = Callable[[float], object]
Made = TypeVar("Made")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Errors within the block are about this file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def place_of(autoencoder: "Autoencoder") -> "torch.device":
    return next(autoencoder.parameters()).device


def raw_latents(path: Path, config: "AutoencoderConfig", family: str | None) -> "Tensor":
    """Those in a file (B, C, h, w), as the autoencoder of `config` takes them.

    Scaled ones were scaled by the factors that their file states, whatever those of the reader are; what the other
    architecture made is unscaled by the reader's own, for both are those that a diffusion model sees. A tiny one takes
    scaled latents: raw ones, which are a KL autoencoder's, are scaled by the factors of the `family` that is named,
    else by those that their file states.
    """
    from vae.checkpoints.families import FAMILIES
    from vae.checkpoints.latentfile import read_latents, scale_in
    from vae.latents import latents_for, unscale_latents
    from vae.models.autoencoder_config import AutoencoderConfig

    latents, scaled = read_latents(path, config.latent_channels)
    if scaled:
        stated = scale_in(path, config.latent_channels)
        scale = config if stated is None or stated.architecture != config.architecture else stated
        unknown = f"{path}: scaled latents, and a model that does not tell its scale"
        require(scale.scale_is_known, unknown, "--family with them: sd, sdxl, sd3 or flux")
        return unscale_latents(latents, scale)
    if config.architecture == "kl":
        return latents
    if family is not None:
        scaling, shift = FAMILIES[family]
        maker = AutoencoderConfig(latent_channels=config.latent_channels, scaling_factor=scaling, shift_factor=shift)
        return latents_for(config, latents, maker)
    maker = scale_in(path, config.latent_channels)
    remedy = "--family with it: sd, sdxl, sd3 or flux"
    require(maker is not None, f"{path}: raw latents that do not tell their scale", remedy)
    assert maker is not None
    return latents_for(config, latents, maker)


def encoded(autoencoder: "Autoencoder", images: "Tensor", memory: int | None, advance: Advance) -> "DiagonalGaussian":
    """Posterior of images (1, C, H, W), within `memory` bytes if any are given; `advance` by 1 in all."""
    from vae.models.strips import encode_in_strips

    if memory is not None:
        return encode_in_strips(autoencoder, images, memory, advance)
    return _whole(autoencoder.encode, autoencoder, images, advance)


def decoded(autoencoder: "Autoencoder", latents: "Tensor", memory: int | None, advance: Advance) -> "Tensor":
    """Images of raw latents (B, C, h, w), as `encoded`."""
    from vae.models.strips import decode_in_strips

    if memory is not None:
        return decode_in_strips(autoencoder, latents, memory, advance)
    return _whole(autoencoder.decode, autoencoder, latents, advance)


def _whole(half: "Callable[[Tensor], Made]", autoencoder: "Autoencoder", given: "Tensor", advance: Advance) -> "Made":
    made = half(given.to(place_of(autoencoder)))
    advance(1)
    return made
