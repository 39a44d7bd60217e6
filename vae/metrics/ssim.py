"""Structural similarity: SSIM, MS-SSIM, and the variants of SSIM in other people's tables.

SSIM is that of Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): 11x11
Gaussian window with sigma 1.5, population covariance, windows that lie inside the image, mean over channels. It equals
scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. torchmetrics
pads.

MS-SSIM is that of Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment" (2003),
equation 7, with the weights of its section 3.2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.errors import InputError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(images: Tensor, reconstructions: Tensor, peak: float = 255.0) -> Tensor:
    """Return the similarity (B,) in [-1, 1], float64, of images and reconstructions (B, C, H, W).

    Black must be 0 and white `peak`: 255 for uint8. Raises InputError where H or W is below 11.
    """
    require_sides(images, WINDOW)
    return similarity(images, reconstructions, peak, blur)


def similarity(
    images: Tensor, reconstructions: Tensor, peak: float, average: Callable[[Tensor], Tensor], unbiased: float = 1.0
) -> Tensor:
    """Return the mean similarity (B,), float64, of images and reconstructions (B, C, H, W).

    The arguments are those of `similarity_maps`.
    """
    luminance, structure = similarity_maps(images, reconstructions, peak, average, unbiased)
    return (luminance * structure).flatten(1).mean(dim=1)


def similarity_maps(
    images: Tensor, reconstructions: Tensor, peak: float, average: Callable[[Tensor], Tensor], unbiased: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return luminance and contrast-structure (B, C, h, w), float64; SSIM is the mean of their product.

    Images and reconstructions (B, C, H, W) have black at 0 and white at `peak`. `average` is the
    local mean, float64 (B, C, H, W) -> (B, C, h, w). Variances are multiplied by `unbiased`.
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
    """Raise InputError where images are smaller than `least` pixels on a side."""
    if min(images.shape[-2:]) < least:
        raise InputError(f"SSIM needs images of at least {least}x{least} pixels, got {tuple(images.shape[-2:])}")


def blur(x: Tensor) -> Tensor:
    """Return the Gaussian means of the windows that fit: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()

    # The Gaussian is separable: two passes of 11 taps give the window of 11x11.
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])


WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from the finest scale to the coarsest
LEAST_SIDE = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the multi-scale similarity (B,) in [0, 1], float64, of images and reconstructions, uint8 (B, C, H, W).

    Where the structure of a scale is unlike on the whole, below 0, no power of it is a number: it counts as 0. The
    result equals piq's and pytorch-msssim's where every scale has even sides. Of an odd side they average the last
    pixel with other pixels than the authors' code, which repeats it, as is done here. Raises InputError where H or W is
    below 161.
    """
    if min(images.shape[-2:]) < LEAST_SIDE:
        raise InputError(f"MS-SSIM needs images of at least {LEAST_SIDE} pixels a side, got {tuple(images.shape[-2:])}")

    x, y = images.double(), reconstructions.double()
    product = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(WEIGHTS, start=1):
        luminance, structure = similarity_maps(x, y, 255.0, blur)

        # Luminance counts at the coarsest scale only.
        compared = luminance * structure if scale == len(WEIGHTS) else structure
        product = product * compared.mean(dim=(2, 3)).clamp(min=0.0) ** weight

        x, y = (F.avg_pool2d(z, 2, ceil_mode=True) for z in (x, y))

    return product.mean(dim=1)


UNIFORM_WINDOW = 7
MARGIN = WINDOW // 2


def uniform_ssim(images: Tensor, reconstructions: Tensor, peak: float) -> Tensor:
    """Return (B,), float64: what scikit-image's `structural_similarity` computes unless asked otherwise.

    It has a flat window of 7x7 pixels that lies inside the image, and the covariance of a sample of 49.
    """
    require_sides(images, UNIFORM_WINDOW)
    count = UNIFORM_WINDOW**2
    return similarity(images, reconstructions, peak, _flat, unbiased=count / (count - 1))


def padded_ssim(images: Tensor, reconstructions: Tensor, peak: float) -> Tensor:
    """Return (B,), float64: torchmetrics' `StructuralSimilarityIndexMeasure`.

    It has Wang's window around every pixel, over a border of five pixels that mirrors the image.
    """
    require_sides(images, MARGIN + 1)
    images, reconstructions = (F.pad(x.double(), [MARGIN] * 4, mode="reflect") for x in (images, reconstructions))
    return similarity(images, reconstructions, peak, blur)


def _flat(x: Tensor) -> Tensor:
    """Return the means of the 7x7 windows that fit."""
    return F.avg_pool2d(x, UNIFORM_WINDOW, stride=1)
