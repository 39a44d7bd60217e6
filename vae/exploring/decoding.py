"""Latents decoded one at a time, and the noise they are drawn with."""

import torch
from torch import Tensor

from vae.models.interface import Autoencoder


def decode_each(model: Autoencoder, latents: Tensor) -> Tensor:
    """Raw latents (..., latent_channels, h, w) -> images (..., C, f * h, f * w), in the memory that one needs."""
    images = torch.cat([model.decode(one) for one in latents.flatten(0, -4).split(1)])
    return images.unflatten(0, latents.shape[:-3])


def standard_normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Drawn where the generator lives, on the CPU without one."""
    home = torch.device("cpu") if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=home).to(device)
