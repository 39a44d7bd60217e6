"""Peak signal-to-noise ratio.

Mean absolute error."""

import torch
from torch import Tensor


def psnr(images: Tensor, reconstructions: Tensor, peak: float = 255.0) -> Tensor:
    """(B, C, H, W) twice -> decibels (B,), float64, one per image; infinite where the two are identical.

    `peak` is the distance from black to white: 255 of uint8, 2 of [-1, 1].
    """
    squared = (images.double() - reconstructions.double()).square()
    return 10.0 * torch.log10(peak**2 / squared.flatten(1).mean(dim=1))


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> error (B,), float64, one per image: 0 is none, 1 is black for white."""
    return (images.double() - reconstructions.double()).abs().flatten(1).mean(dim=1) / 255.0
