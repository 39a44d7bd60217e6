"""Latents that no image has, decoded: does an autoencoder generate, or only compress?"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vae.data.transforms import to_uint8
from vae.errors import require
from vae.exploring.decoding import decode_each, standard_normal
from vae.latents import LatentStatistics
from vae.metrics.psnr import psnr
from vae.models.interface import Autoencoder


@torch.no_grad()
def sample_prior(
    model: Autoencoder,
    size: tuple[int, int],
    count: int,
    statistics: LatentStatistics | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`count` images (count, C, *size) decoded from noise; `size` is (height, width) in pixels.

    Each latent element is drawn from N(0, 1), the prior that the KL term pulls to, or from the normal distribution
    with its channel's mean and standard deviation in `statistics`. Raises InputError for a size that is no multiple of
    the model's downsampling factor.
    """
    factor = model.config.downsample_factor
    fits = all(side > 0 and side % factor == 0 for side in size)
    require(fits, f"size={tuple(size)}", f"height and width in multiples of {factor}")
    shape = (count, model.config.latent_channels, size[0] // factor, size[1] // factor)
    latents = standard_normal(shape, generator, next(model.parameters()).device)
    if statistics is not None:
        mean, std = (values[:, None, None].to(latents) for values in (statistics.channel_mean, statistics.channel_std))
        latents = mean + std * latents
    return decode_each(model, latents)


@torch.no_grad()
def sample_positions(
    model: Autoencoder, latents: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Latents (N, K, h, w) -> `count` images (count, C, H, W); at each position the K values of a random one of theirs.

    Every position then has the distribution that images have, channels together; only how positions hang together is
    lost. What is bad here is so for that reason.
    """
    channels, height, width = latents.shape[1:]
    values = latents.transpose(0, 1).flatten(1)
    home = torch.device("cpu") if generator is None else generator.device
    chosen = torch.randint(values.shape[1], (count * height * width,), generator=generator, device=home)
    drawn = values[:, chosen.to(values.device)].view(channels, count, height, width)
    return decode_each(model, drawn.transpose(0, 1))


@dataclass(frozen=True)
class Survey:
    """A model on some images: numbers over all of them, and of the first few the images and their posteriors.

    `posterior_std` is the mean over all latent elements, `psnr` the images' mean in decibels, of the posteriors' means.
    `images` and `reconstructions` are (count, C, H, W), `mean` and `std` (count, K, h, w).
    """

    statistics: LatentStatistics
    posterior_std: float
    psnr: float
    images: Tensor
    reconstructions: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def survey(model: Autoencoder, images: Iterable[Tensor], count: int) -> Survey:
    """One or more images (C, H, W) in [-1, 1], all of one size; the first `count` are kept."""
    statistics, numbers, kept = LatentStatistics(model.config.latent_channels), [], []
    for image in images:
        posterior = model.encode(image[None])
        reconstruction = model.decode(posterior.mode())
        statistics.update(posterior)
        decibels = psnr(to_uint8(image[None]), to_uint8(reconstruction))
        numbers.append((posterior.std.mean().item(), decibels.item()))
        if len(kept) < count:
            kept.append((image, reconstruction[0], posterior.mean[0], posterior.std[0]))
    posterior_std, mean_psnr = torch.tensor(numbers).mean(dim=0).tolist()
    return Survey(statistics, posterior_std, mean_psnr, *(torch.stack(column) for column in zip(*kept, strict=True)))
