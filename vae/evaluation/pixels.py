"""How floats in [-1, 1] become what a metric sees: (B, C, H, W) -> the same shape.

The three roundings differ where a value lies half-way between two greys, to within the arithmetic's precision.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae.data.transforms import to_model_range, to_uint8


class Sees(NamedTuple):
    """What a metric sees of images in [-1, 1], and how far white is from black there."""

    change: Callable[[Tensor], Tensor]
    peak: float

    def __call__(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor, float]:
        return self.change(images), self.change(reconstructions), self.peak


def rounded(x: Tensor) -> Tensor:
    """uint8, as our reconstructions are written."""
    return to_uint8(x)


def rounded_to_signed(x: Tensor) -> Tensor:
    """The same greys in [-1, 1]."""
    return to_model_range(rounded(x))


def rounded_by_lightningdit(x: Tensor) -> Tensor:
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8)


def rounded_by_dc_ae(x: Tensor) -> Tensor:
    return (255.0 * ((x + 1.0) / 2.0) + 0.5).clamp(0, 255).to(torch.uint8)


def rounded_by_dc_ae_to_signed(x: Tensor) -> Tensor:
    return 2.0 * (rounded_by_dc_ae(x) / 255.0) - 1.0


def truncated(x: Tensor) -> Tensor:
    """uint8. Many greys of an image itself get darker by one: the way to [-1, 1] and back rounds."""
    return (to_unit(x) * 255.0).to(torch.uint8)


def truncated_to_unit(x: Tensor) -> Tensor:
    """[0, 1]."""
    return truncated(x) / 255.0


def truncated_to_signed(x: Tensor) -> Tensor:
    return to_model_range(truncated(x))


def to_unit(x: Tensor) -> Tensor:
    """[0, 1], clamped."""
    return ((x + 1.0) / 2.0).clamp(0.0, 1.0)


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-1.0, 1.0)


def as_decoded(x: Tensor) -> Tensor:
    """Beyond [-1, 1] too, where a decoder goes there."""
    return x
