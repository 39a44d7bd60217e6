"""Peak signal-to-noise ratio."""

import torch
from torch import Tensor


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> decibels (B,), float64, one per image; infinite where the two are identical."""
    squared = (images.double() - reconstructions.double()).square()
    return 10.0 * torch.log10(255.0**2 / squared.flatten(1).mean(dim=1))
