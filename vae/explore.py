"""Exploring a latent space: what people do with an autoencoder besides compressing, as functions of a model and images.

- `interpolate` goes from one image to another through the latents between them.
- `vary` decodes samples of an image's posterior: what does it leave open?
- `restore` puts damaged images through the autoencoder: does it give back what was lost?
- `ablate_channels` and `channel_maps` show which latent channel carries what.
- `sample_prior`, `sample_positions` and `survey` decode latents that no image has: does a model generate, or only
  compress?

Images are in [-1, 1] and on the model's device. Decoded images are in about [-1, 1] and not clamped. A generator may
live on the CPU whatever the device is: a seed then means the same everywhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.transforms import to_uint8
from vae.errors import require
from vae.latents import LatentStatistics
from vae.metrics.pixel import psnr
from vae.metrics.ssim import ssim
from vae.models.base import Autoencoder


def decode_each(model: Autoencoder, latents: Tensor) -> Tensor:
    """Decode raw latents (..., latent_channels, h, w) to images (..., C, f * h, f * w).

    f is the downsampling factor. The latents are decoded one at a time, so that all need the memory of one.
    """
    images = torch.cat([model.decode(one) for one in latents.flatten(0, -4).split(1)])
    return images.unflatten(0, latents.shape[:-3])


def standard_normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw from N(0, 1) where the generator lives, or on the CPU without one, and move the draw to `device`."""
    home = torch.device("cpu") if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=home).to(device)


PARALLEL = 1e-6  # sine of the angle below which two vectors are joined by the line


@torch.no_grad()
def interpolate(model: Autoencoder, first: Tensor, second: Tensor, steps: int, *, spherical: bool = False) -> Tensor:
    """Decode `steps` images (steps, C, H, W) at equal steps from the latents of one image to those of another.

    `first` and `second` are (C, H, W) in [-1, 1]. Their latents are the posteriors' means, so that the first and last
    results are the images' reconstructions. `spherical` goes along the arc of `slerp`, else along the line. Raises
    InputError for fewer than two steps and for images of different sizes.
    """
    sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (first, second)]
    require(first.shape == second.shape, f"images of {sizes[0]} and {sizes[1]} pixels", "two of the same size")
    ends = [model.encode(image[None]).mode()[0] for image in (first, second)]
    return decode_each(model, path(ends[0], ends[1], steps, slerp if spherical else torch.lerp))


def path(
    first: Tensor, second: Tensor, steps: int, between: Callable[[Tensor, Tensor, float], Tensor] = torch.lerp
) -> Tensor:
    """Return (steps, *shape) from one tensor to another of the same shape, both ends included.

    On images, the line is their cross-fade. Raises InputError for fewer than two steps.
    """
    require(steps >= 2, f"steps={steps}", "2 or more: both ends are among them")
    return torch.stack([between(first, second, step / (steps - 1)) for step in range(steps)])


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return the point at `share` in [0, 1] of the arc between two tensors, each taken as one vector.

    Shoemake, "Animating Rotation with Quaternion Curves" (1985). Vectors of one norm keep it on the way. Parallel and
    opposite vectors have no single arc between them, and zero has no direction: these are joined by the line.
    """
    a, b = first.double().flatten(), second.double().flatten()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1.0, 1.0))
    if not angle.sin() > PARALLEL:  # or NaN, for a zero vector
        return torch.lerp(first, second, share)
    mixed = (torch.sin((1.0 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()
    return mixed.to(first.dtype).view_as(first)


@dataclass(frozen=True)
class Variations:
    """Samples of the posteriors of B images, decoded.

    `reconstructions` (B, C, H, W) are decoded from the posteriors' means, `samples` (B, count, C, H, W) from samples.
    `posterior_std` (B,) is the posterior's standard deviation, mean over the latent's elements: the noise drawn at
    spread 1. `latent_std` (B,) is the standard deviation of the posterior's mean over those elements, to compare that
    noise with.
    """

    reconstructions: Tensor
    samples: Tensor
    posterior_std: Tensor
    latent_std: Tensor

    @property
    def pixel_std(self) -> Tensor:
        """Standard deviation over the samples, mean over the channels: (B, 1, H, W). From black to white is 2."""
        return self.samples.std(dim=1, correction=0).mean(dim=1, keepdim=True)

    @property
    def psnr(self) -> Tensor:
        """PSNR (B, count) in dB of each sample against the mean's reconstruction, infinite where they are identical."""
        means = self.reconstructions[:, None].expand_as(self.samples)
        pairs = (images.flatten(0, 1).clamp(-1.0, 1.0) for images in (means, self.samples))
        return psnr(*pairs, peak=2.0).unflatten(0, self.samples.shape[:2])


@torch.no_grad()
def vary(
    model: Autoencoder, images: Tensor, count: int, spread: float = 1.0, generator: torch.Generator | None = None
) -> Variations:
    """Decode `count` samples of the posterior of each image (B, C, H, W) in [-1, 1].

    `spread` multiplies the posterior's standard deviation: 1 is the posterior itself, 0 its mean. Raises InputError for
    a count below 1 and a negative spread.
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


BLOCKS = 16  # a side of the grid that a mask is made of


@dataclass(frozen=True)
class Restoration:
    """Damaged images, reconstructed, and how near they are to the clean ones.

    `restored` is (B, C, H, W). PSNR in dB and SSIM are (B,), against the clean images, `before` and `after`
    reconstruction.
    """

    restored: Tensor
    psnr_before: Tensor
    psnr_after: Tensor
    ssim_before: Tensor
    ssim_after: Tensor

    @property
    def psnr_gain(self) -> Tensor:
        """Decibels (B,) by which the autoencoder brought each image nearer to the clean one, negative where it lost."""
        return self.psnr_after - self.psnr_before

    @property
    def ssim_gain(self) -> Tensor:
        """SSIM (B,) by which the autoencoder brought each image nearer to the clean one, negative where it lost."""
        return self.ssim_after - self.ssim_before


def add_noise(images: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Add Gaussian noise of standard deviation `std` to images (B, C, H, W) in [-1, 1], and clamp them to [-1, 1].

    Raises InputError for a negative `std`.
    """
    require(std >= 0, f"std={std}", "0 or more, of images in [-1, 1]")
    return (images + std * standard_normal(tuple(images.shape), generator, images.device)).clamp(-1.0, 1.0)


def mask_blocks(images: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Make a share of each image grey, in blocks. Images are (B, C, H, W) in [-1, 1].

    Each image is divided into a grid of 16x16 blocks, and `share` of them, rounded to whole blocks, become grey. Every
    image gets other blocks. Raises InputError for a share outside [0, 1].
    """
    require(0 <= share <= 1, f"share={share}", "0 to 1, of the image's area")

    height, width = images.shape[-2:]
    order = standard_normal((len(images), BLOCKS**2), generator, images.device).argsort(dim=1)
    hidden = (order < round(share * BLOCKS**2)).view(-1, 1, BLOCKS, BLOCKS)
    rows, columns = (torch.arange(side, device=images.device) * BLOCKS // side for side in (height, width))
    return images.masked_fill(hidden[:, :, rows][:, :, :, columns], 0.0)


@torch.no_grad()
def restore(model: Autoencoder, images: Tensor, damaged: Tensor) -> Restoration:
    """Reconstruct damaged images, and measure whether that brought them nearer to the clean ones.

    `images` are the clean ones; both are (B, C, H, W) in [-1, 1]. The posteriors' means are decoded. Metrics see images
    rounded to uint8. H and W must be at least 11, for SSIM.
    """
    restored = decode_each(model, model.encode(damaged).mode())
    clean, before, after = (to_uint8(one) for one in (images, damaged, restored))
    return Restoration(restored, psnr(clean, before), psnr(clean, after), ssim(clean, before), ssim(clean, after))


BLACK, WHITE = 0.01, 0.99  # quantiles, since with the extremes a few outliers would leave a map all grey


@dataclass(frozen=True)
class Ablation:
    """What each of K latent channels is worth to B images.

    `latents` (B, K, h, w) are the posteriors' means, and `reconstructions` (B, C, H, W) what they decode to. `ablated`
    (B, K, C, H, W) are decoded with channel k replaced by its mean over the image. `psnr_lost` (B, K) says how many
    decibels that costs, with image and reconstruction rounded to uint8.
    """

    latents: Tensor
    reconstructions: Tensor
    ablated: Tensor
    psnr_lost: Tensor


@torch.no_grad()
def ablate_channels(model: Autoencoder, images: Tensor) -> Ablation:
    """Decode images (B, C, H, W) in [-1, 1] without each latent channel in turn, and measure what that costs."""
    latents = model.encode(images).mode()

    # (B, K, K, h, w): copy k of an image's latents has channel k replaced by its mean.
    chosen = torch.eye(latents.shape[1], dtype=torch.bool, device=latents.device)[:, :, None, None]
    without = torch.where(chosen, latents.mean(dim=(2, 3), keepdim=True)[:, None], latents[:, None])

    reconstructions, ablated = decode_each(model, latents), decode_each(model, without)

    clean, whole, less = (to_uint8(one) for one in (images, reconstructions, ablated))
    left = psnr(clean[:, None].expand_as(less).flatten(0, 1), less.flatten(0, 1)).unflatten(0, less.shape[:2])
    return Ablation(latents, reconstructions, ablated, psnr(clean, whole)[:, None] - left)


def channel_maps(latents: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Turn latents (K, h, w) into a grey uint8 picture of each channel (K, 1, *size), with its range (K, 2).

    The range is what black and white stand for: the channel's own 1st and 99th percentiles.
    """
    values = latents.flatten(1)
    low, high = (torch.quantile(values, share, dim=1) for share in (BLACK, WHITE))

    span = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    shares = (latents - low[:, None, None]) / span[:, None, None]
    pictures = F.interpolate(to_uint8(2.0 * shares[:, None] - 1.0), size=size, mode="nearest")
    return pictures, torch.stack([low, high], dim=1)


@torch.no_grad()
def sample_prior(
    model: Autoencoder,
    size: tuple[int, int],
    count: int,
    statistics: LatentStatistics | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Decode `count` images (count, C, *size) from noise. `size` is (height, width) in pixels.

    Each latent element is drawn from N(0, 1), the prior that the KL term pulls to. With `statistics` it is drawn from
    the normal distribution with its channel's mean and standard deviation. Raises InputError for a size that is not a
    multiple of the model's downsampling factor.
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
    """Decode `count` images (count, C, H, W) from shuffled latents: each position has the K values of a random one.

    `latents` (N, K, h, w) are those of images. Every position then has the distribution that images have, channels
    together. Only the relation between positions is lost, so whatever is bad in the result is bad for that reason.
    """
    channels, height, width = latents.shape[1:]
    values = latents.transpose(0, 1).flatten(1)

    home = torch.device("cpu") if generator is None else generator.device
    chosen = torch.randint(values.shape[1], (count * height * width,), generator=generator, device=home)
    drawn = values[:, chosen.to(values.device)].view(channels, count, height, width)
    return decode_each(model, drawn.transpose(0, 1))


@dataclass(frozen=True)
class Survey:
    """A model on some images: numbers over all of them, and the first few images with their posteriors.

    `posterior_std` is the mean over all latent elements. `psnr` is the mean over the images in dB, of the
    reconstructions from the posteriors' means. `images` and `reconstructions` are (count, C, H, W), `mean` and `std`
    (count, K, h, w).
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
    """Measure a model on one or more images (C, H, W) in [-1, 1] of one size, and keep the first `count` of them."""
    statistics = LatentStatistics(model.config.latent_channels)
    numbers = []
    kept = []

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
