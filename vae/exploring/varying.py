"""What an image's posterior leaves open: samples of it, decoded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vae.errors import require
from vae.exploring.decoding import decode_each, standard_normal
from vae.metrics.psnr import psnr
from vae.models.interface import Autoencoder


@dataclass(frozen=True)
class Variations:
    """Of B images: `reconstructions` (B, C, H, W) of the posteriors' means, `samples` (B, count, C, H, W).

    `posterior_std` and `latent_std` (B,): the noise that is drawn at spread 1, mean over the latent's elements, and
    the standard deviation of the posterior's means over those elements, which is what that noise stands beside.
    """

    reconstructions: Tensor
    samples: Tensor
    posterior_std: Tensor
    latent_std: Tensor

    @property
    def pixel_std(self) -> Tensor:
        """Standard deviation over the samples, mean over the image's channels: (B, 1, H, W), black to white is 2."""
        return self.samples.std(dim=1, correction=0).mean(dim=1, keepdim=True)

    @property
    def psnr(self) -> Tensor:
        """Decibels (B, count) of each sample against the mean's reconstruction; infinite where they are identical."""
        means = self.reconstructions[:, None].expand_as(self.samples)
        pairs = (images.flatten(0, 1).clamp(-1.0, 1.0) for images in (means, self.samples))
        return psnr(*pairs, peak=2.0).unflatten(0, self.samples.shape[:2])


@torch.no_grad()
def vary(
    model: Autoencoder, images: Tensor, count: int, spread: float = 1.0, generator: torch.Generator | None = None
) -> Variations:
    """Images (B, C, H, W) in [-1, 1] -> `count` decoded samples of each one's posterior.

    `spread` multiplies the posterior's standard deviation: 1 is the posterior itself, 0 its mean. Raises InputError
    for a count below 1 and a negative spread.
    """
    require(count >= 1, f"count={count}", "1 or more")
    require(spread >= 0, f"spread={spread}", "0 or more")
    posterior = model.encode(images)
    mean, std = posterior.mean[:, None], posterior.std[:, None]
    noise = standard_normal((len(images), count, *mean.shape[2:]), generator, mean.device)
    return Variations(
        decode_each(model, posterior.mean),
        decode_each(model, mean + spread * std * noise),
        posterior.std.flatten(1).mean(dim=1),
        posterior.mean.flatten(1).std(dim=1, correction=0),
    )
