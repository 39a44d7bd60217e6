"""A model run as a command asks: whole, or in strips within a bound of memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vae.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vae.models.autoencoder import AutoencoderKL
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


def place_of(autoencoder: "AutoencoderKL") -> "torch.device":
    return autoencoder.decoder.conv_in.weight.device


def encoded(autoencoder: "AutoencoderKL", images: "Tensor", memory: int | None, advance: Advance) -> "DiagonalGaussian":
    """Posterior of images (1, C, H, W), within `memory` bytes if any are given; `advance` by 1 in all."""
    from vae.models.strips import encode_in_strips

    if memory is not None:
        return encode_in_strips(autoencoder, images, memory, advance)
    return _whole(autoencoder.encode, autoencoder, images, advance)


def decoded(autoencoder: "AutoencoderKL", latents: "Tensor", memory: int | None, advance: Advance) -> "Tensor":
    """Images of raw latents (B, C, h, w), as `encoded`."""
    from vae.models.strips import decode_in_strips

    if memory is not None:
        return decode_in_strips(autoencoder, latents, memory, advance)
    return _whole(autoencoder.decode, autoencoder, latents, advance)


def _whole(half: "Callable[[Tensor], Made]", autoencoder: "AutoencoderKL", given: "Tensor", advance: Advance) -> "Made":
    made = half(given.to(place_of(autoencoder)))
    advance(1)
    return made
