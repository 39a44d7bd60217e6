"""Structural similarity.

Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): 11x11 Gaussian window
with sigma 1.5, population covariance, windows that lie inside the image, mean over channels. Equal to scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`; torchmetrics pads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.errors import InputError

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> similarity (B,) in [-1, 1], float64. H and W at least 11."""
    if min(images.shape[-2:]) < WINDOW:
        raise InputError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {tuple(images.shape[-2:])}")
    x, y = images.double(), reconstructions.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian over the windows that fit: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])
