"""Structural similarity at five scales.

Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment" (2003), equation 7, with
the weights of its section 3.2. Equal to piq and pytorch-msssim where every scale has even sides; of an odd side they
average the last pixel with others than the authors' code, which repeats it, as here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.errors import InputError
from vae.metrics.ssim import WINDOW, blur, similarity_maps

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from the finest scale to the coarsest
LEAST_SIDE = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> similarity (B,) in [0, 1], float64. H and W at least 161.

    Where a scale's structure is unlike on the whole, below 0, no power of it is a number: it counts as 0.
    """
    if min(images.shape[-2:]) < LEAST_SIDE:
        raise InputError(f"MS-SSIM needs images of at least {LEAST_SIDE} pixels a side, got {tuple(images.shape[-2:])}")
    x, y = images.double(), reconstructions.double()
    product = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(WEIGHTS, start=1):
        luminance, structure = similarity_maps(x, y, 255.0, blur)
        compared = luminance * structure if scale == len(WEIGHTS) else structure
        product = product * compared.mean(dim=(2, 3)).clamp(min=0.0) ** weight
        x, y = (F.avg_pool2d(z, 2, ceil_mode=True) for z in (x, y))
    return product.mean(dim=1)
