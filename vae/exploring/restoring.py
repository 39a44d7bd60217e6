"""Damaged images through an autoencoder: does it give back what was lost?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vae.data.transforms import to_uint8
from vae.errors import require
from vae.exploring.decoding import decode_each, standard_normal
from vae.metrics.psnr import psnr
from vae.metrics.ssim import ssim
from vae.models.interface import Autoencoder

BLOCKS = 16  # a side: the grid that a mask is made of


@dataclass(frozen=True)
class Restoration:
    """Of B images: `restored` (B, C, H, W), and against the clean ones, before and after: decibels and SSIM (B,)."""

    restored: Tensor
    psnr_before: Tensor
    psnr_after: Tensor
    ssim_before: Tensor
    ssim_after: Tensor

    @property
    def psnr_gain(self) -> Tensor:
        """Decibels (B,) by which the autoencoder brought the image nearer to the clean one; negative where it lost."""
        return self.psnr_after - self.psnr_before

    @property
    def ssim_gain(self) -> Tensor:
        """The same of SSIM."""
        return self.ssim_after - self.ssim_before


def add_noise(images: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with Gaussian noise of this standard deviation, clamped to [-1, 1].

    Raises InputError for a negative `std`.
    """
    require(std >= 0, f"std={std}", "0 or more, of images in [-1, 1]")
    return (images + std * standard_normal(tuple(images.shape), generator, images.device)).clamp(-1.0, 1.0)


def mask_blocks(images: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with this share of the 16x16 blocks each divides into made grey, to the nearest.

    Other blocks in every image. Raises InputError for a share outside [0, 1].
    """
    require(0 <= share <= 1, f"share={share}", "0 to 1, of the image's area")
    height, width = images.shape[-2:]
    order = standard_normal((len(images), BLOCKS**2), generator, images.device).argsort(dim=1)
    hidden = (order < round(share * BLOCKS**2)).view(-1, 1, BLOCKS, BLOCKS)
    rows, columns = (torch.arange(side, device=images.device) * BLOCKS // side for side in (height, width))
    return images.masked_fill(hidden[:, :, rows][:, :, :, columns], 0.0)


@torch.no_grad()
def restore(model: Autoencoder, images: Tensor, damaged: Tensor) -> Restoration:
    """Clean and damaged images (B, C, H, W) in [-1, 1] -> the damaged ones reconstructed, and how near the clean ones.

    The posteriors' means are decoded. Metrics see images rounded to uint8. H and W at least 11, for SSIM.
    """
    restored = decode_each(model, model.encode(damaged).mode())
    clean, before, after = (to_uint8(one) for one in (images, damaged, restored))
    return Restoration(restored, psnr(clean, before), psnr(clean, after), ssim(clean, before), ssim(clean, after))
