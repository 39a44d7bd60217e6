"""Between an autoencoder's raw latents and what a diffusion model sees, and the statistics that join the two."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.models.base import Autoencoder
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian


def scale_latents(latents: Tensor, config: AutoencoderConfig) -> Tensor:
    """Raw latents (B, C, h, w) -> (latents - shift) * scale, the input of a diffusion model.

    Shift and scale are `shift_factor` and `scaling_factor`; where the configuration has `latents_mean` and
    `latents_std`, per channel, `latents_mean` and `scaling_factor / latents_std`, as in diffusers' SDXL pipelines.
    Warns where they are assumed, for the file that the configuration came from does not tell them.
    """
    shift, scale = _shift_and_scale(config, latents)
    return (latents - shift) * scale


def unscale_latents(latents: Tensor, config: AutoencoderConfig) -> Tensor:
    """The inverse of `scale_latents`."""
    shift, scale = _shift_and_scale(config, latents)
    return latents / scale + shift


def latents_for(reader: AutoencoderConfig, latents: Tensor, maker: AutoencoderConfig) -> Tensor:
    """The `maker`'s raw latents as raw latents of the `reader`.

    They are the same where both are of one architecture: a decoder of the same family, or a fine-tuned one, takes them
    as they are whatever scale is written beside it. Between a KL and a tiny autoencoder, whose latents are scaled, they
    are those that a diffusion model sees alike.
    """
    if reader.architecture == maker.architecture:
        return latents
    return unscale_latents(scale_latents(latents, maker), reader)


def scale_moments(mean: Tensor, logvar: Tensor, config: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """(mean, logvar) of raw latents, each (B, C, h, w) -> of those that `scale_latents` makes of them."""
    return scale_latents(mean, config), logvar + _log_of_squared_scale(config, mean)


def unscale_moments(mean: Tensor, logvar: Tensor, config: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """The inverse of `scale_moments`."""
    return unscale_latents(mean, config), logvar - _log_of_squared_scale(config, mean)


def _log_of_squared_scale(config: AutoencoderConfig, like: Tensor) -> Tensor:
    return (like.new_ones(()) * _shift_and_scale(config, like)[1]).square().log()


def _shift_and_scale(config: AutoencoderConfig, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    if not config.scale_is_known:
        told = f"scaling factor {config.scaling_factor:g} is assumed, for the file does not tell its family"
        warnings.warn(f"{told}; name it: --family, family= in Python, or vae convert --family once", stacklevel=3)
    if config.latents_mean is None or config.latents_std is None:
        return config.shift_factor or 0.0, config.scaling_factor
    mean, std = (like.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return mean, config.scaling_factor / std


ACTIVE = 0.01  # Burda et al.: a unit whose posterior mean varies less over the data says nothing of it


class LatentStatistics:
    """Mean and variance of posterior samples per channel and over all, and what each channel carries, in float64.

    Exact for any batch sizes and order (Chan et al., 1979). By the law of total variance the variance of the samples is
    that of the means plus the mean of the variances: no noise is drawn.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # summed squared distances from the mean
        self._noise = torch.zeros(channels, dtype=torch.float64)  # that part of them which is the posterior's variance
        self._kl = torch.zeros(channels, dtype=torch.float64)
        self._clamped = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        mean = posterior.mean.detach().double().transpose(0, 1).flatten(1).cpu()  # (channels, elements)
        logvar = posterior.logvar.detach().double().transpose(0, 1).flatten(1).cpu()
        noise = logvar.exp()
        other = LatentStatistics(len(mean))
        other.count = mean.shape[1]
        other._mean = mean.mean(dim=1)
        other._noise = noise.sum(dim=1)
        other._squares = (mean - other._mean[:, None]).square().sum(dim=1) + other._noise
        other._kl = 0.5 * (mean.square() + noise - 1.0 - logvar).sum(dim=1)
        lowest, highest = LOGVAR_RANGE
        other._clamped = int(((logvar <= lowest) | (logvar >= highest)).sum())
        self.merge(other)

    def merge(self, other: "LatentStatistics") -> None:
        count = self.count + other.count
        if not other.count:
            return
        difference = other._mean - self._mean
        self._squares += other._squares + difference.square() * (self.count * other.count / count)
        self._mean += difference * (other.count / count)
        self._noise += other._noise
        self._kl += other._kl
        self._clamped += other._clamped
        self.count = count

    @property
    def channel_mean(self) -> Tensor:
        return self._mean.clone()

    @property
    def channel_std(self) -> Tensor:
        return (self._squares / self.count).sqrt()

    @property
    def mean(self) -> float:
        return self._mean.mean().item()

    @property
    def std(self) -> float:
        within = (self._squares / self.count).mean()
        between = (self._mean - self._mean.mean()).square().mean()
        return math.sqrt((within + between).item())

    @property
    def scaling_factor(self) -> float:
        """What brings the latents to unit standard deviation: 1 / std, over all channels (LDM, appendix G)."""
        return 1.0 / self.std

    @property
    def channel_kl(self) -> Tensor:
        """KL(q || N(0, I)) of each channel, in nats per latent element."""
        return self._kl / self.count

    @property
    def channel_is_active(self) -> Tensor:
        """Whether the posterior mean of a channel varies over the data by more than 0.01.

        The criterion of Burda et al., "Importance Weighted Autoencoders" (2016), a channel taken as one unit.
        """
        return (self._squares - self._noise) / self.count > ACTIVE

    @property
    def clamped_share(self) -> float:
        """Of the log-variances, how many stand at the bounds of LOGVAR_RANGE, where they have no gradient."""
        return self._clamped / (self.count * len(self._mean))

    @property
    def has_width(self) -> bool:
        """False where every log-variance is the least there is, as a tiny autoencoder's are: their KL says nothing."""
        return bool((self._noise / self.count > 2 * math.exp(LOGVAR_RANGE[0])).any())

    def summary(self) -> dict[str, Any]:
        """Everything measured, as plain numbers; `latents_mean` and `latents_std` are per channel."""
        kl = {"kl_per_channel": self.channel_kl.tolist()} if self.has_width else {}
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.mean,
            "mean": self.mean,
            "std": self.std,
            "latents_mean": self.channel_mean.tolist(),
            "latents_std": self.channel_std.tolist(),
            **kl,
            "active_channels": int(self.channel_is_active.sum()),
            "values_per_channel": self.count,
        }


@torch.no_grad()
def measure_latents(model: Autoencoder, batches: Iterable[Tensor]) -> LatentStatistics:
    """Of the posteriors of `batches`, images (B, C, H, W) in [-1, 1] on the model's device."""
    statistics = LatentStatistics(model.config.latent_channels)
    for images in batches:
        statistics.update(model.encode(images))
    return statistics
