"""The structural similarities of others' tables, which are not Wang's: see `vae.metrics.ssim`."""

import torch.nn.functional as F
from torch import Tensor

from vae.metrics.ssim import WINDOW, blur, require_sides, similarity

UNIFORM_WINDOW = 7
MARGIN = WINDOW // 2


def uniform_ssim(images: Tensor, reconstructions: Tensor, peak: float) -> Tensor:
    """(B, C, H, W) twice -> (B,), float64: what scikit-image's `structural_similarity` does unless asked otherwise.

    A flat window of 7x7 pixels that lies inside the image, and the covariance of a sample of 49.
    """
    require_sides(images, UNIFORM_WINDOW)
    count = UNIFORM_WINDOW**2
    return similarity(images, reconstructions, peak, _flat, unbiased=count / (count - 1))


def padded_ssim(images: Tensor, reconstructions: Tensor, peak: float) -> Tensor:
    """(B, C, H, W) twice -> (B,), float64: torchmetrics' `StructuralSimilarityIndexMeasure`.

    Wang's window around every pixel, over a border of five pixels that mirrors the image.
    """
    require_sides(images, MARGIN + 1)
    images, reconstructions = (F.pad(x.double(), [MARGIN] * 4, mode="reflect") for x in (images, reconstructions))
    return similarity(images, reconstructions, peak, blur)


def _flat(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, UNIFORM_WINDOW, stride=1)
