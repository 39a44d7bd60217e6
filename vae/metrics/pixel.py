"""Metrics of pixel errors: peak signal-to-noise ratio and mean absolute error."""

import torch
from torch import Tensor


def psnr(images: Tensor, reconstructions: Tensor, peak: float = 255.0) -> Tensor:
    """Return the PSNR in decibels (B,), float64, of images and reconstructions (B, C, H, W).

    It is infinite where the two are identical. `peak` is the distance from black to white: 255 for uint8, 2 for
    [-1, 1].
    """
    squared = (images.double() - reconstructions.double()).square()
    return 10.0 * torch.log10(peak**2 / squared.flatten(1).mean(dim=1))


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean absolute error (B,), float64, of images and reconstructions, uint8 (B, C, H, W).

    0 is no error, 1 is black for white.
    """
    return (images.double() - reconstructions.double()).abs().flatten(1).mean(dim=1) / 255.0
