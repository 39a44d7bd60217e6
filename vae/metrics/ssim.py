"""Structural similarity.

Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): 11x11 Gaussian window
with sigma 1.5, population covariance, windows that lie inside the image, mean over channels. Equal to scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`; torchmetrics pads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.errors import InputError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(images: Tensor, reconstructions: Tensor, peak: float = 255.0) -> Tensor:
    """(B, C, H, W) twice -> similarity (B,) in [-1, 1], float64. H and W at least 11.

    Black must be 0 and white `peak`: 255 of uint8.
    """
    require_sides(images, WINDOW)
    return similarity(images, reconstructions, peak, blur)


def similarity(
    images: Tensor, reconstructions: Tensor, peak: float, average: Callable[[Tensor], Tensor], unbiased: float = 1.0
) -> Tensor:
    """(B, C, H, W) twice -> mean similarity (B,), float64; the arguments are those of `similarity_maps`."""
    luminance, structure = similarity_maps(images, reconstructions, peak, average, unbiased)
    return (luminance * structure).flatten(1).mean(dim=1)


def similarity_maps(
    images: Tensor, reconstructions: Tensor, peak: float, average: Callable[[Tensor], Tensor], unbiased: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice -> luminance and contrast-structure (B, C, h, w), float64; SSIM is the mean of their product.

    Any range whose black and white are `peak` apart. `average` is the local mean, float64 (B, C, H, W) -> (B, C, h, w);
    variances are multiplied by `unbiased`.
    """
    x, y = images.double(), reconstructions.double()
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    mean_x, mean_y = average(x), average(y)
    variance_x = unbiased * (average(x * x) - mean_x * mean_x)
    variance_y = unbiased * (average(y * y) - mean_y * mean_y)
    covariance = unbiased * (average(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, structure


def require_sides(images: Tensor, least: int) -> None:
    if min(images.shape[-2:]) < least:
        raise InputError(f"SSIM needs images of at least {least}x{least} pixels, got {tuple(images.shape[-2:])}")


def blur(x: Tensor) -> Tensor:
    """Separable Gaussian over the windows that fit: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])
