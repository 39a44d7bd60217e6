"""Which latent channel carries what: each as a map, and images decoded without it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.transforms import to_uint8
from vae.exploring.decoding import decode_each
from vae.metrics.psnr import psnr
from vae.models.interface import Autoencoder

BLACK, WHITE = 0.01, 0.99  # percentiles: a few outliers would leave a map all grey


@dataclass(frozen=True)
class Ablation:
    """Of B images and K latent channels.

    `latents` (B, K, h, w) are the posteriors' means, `reconstructions` (B, C, H, W) what they decode to, and
    `ablated` (B, K, C, H, W) the same with channel k replaced by its mean over the image. `psnr_lost` (B, K) says how
    many decibels that costs against the image, both rounded to uint8.
    """

    latents: Tensor
    reconstructions: Tensor
    ablated: Tensor
    psnr_lost: Tensor


@torch.no_grad()
def ablate_channels(model: Autoencoder, images: Tensor) -> Ablation:
    """Images (B, C, H, W) in [-1, 1] -> what each latent channel is worth to them."""
    latents = model.encode(images).mode()
    chosen = torch.eye(latents.shape[1], dtype=torch.bool, device=latents.device)[:, :, None, None]
    without = torch.where(chosen, latents.mean(dim=(2, 3), keepdim=True)[:, None], latents[:, None])
    reconstructions, ablated = decode_each(model, latents), decode_each(model, without)
    clean, whole, less = (to_uint8(one) for one in (images, reconstructions, ablated))
    left = psnr(clean[:, None].expand_as(less).flatten(0, 1), less.flatten(0, 1)).unflatten(0, less.shape[:2])
    return Ablation(latents, reconstructions, ablated, psnr(clean, whole)[:, None] - left)


def channel_maps(latents: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Latents (K, h, w) -> each channel as a grey uint8 picture (K, 1, *size), and its range (K, 2).

    The range is what black and white stand for: the channel's own 1st and 99th percentiles.
    """
    values = latents.flatten(1)
    low, high = (torch.quantile(values, share, dim=1) for share in (BLACK, WHITE))
    span = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    shares = (latents - low[:, None, None]) / span[:, None, None]
    pictures = F.interpolate(to_uint8(2.0 * shares[:, None] - 1.0), size=size, mode="nearest")
    return pictures, torch.stack([low, high], dim=1)
