"""The step between an autoencoder's raw latents and the latents of a diffusion model, and the statistics behind it.

`scale_latents` and `unscale_latents` apply and undo the scale that a configuration states. `LatentStatistics` measures
the mean and standard deviation from which such a scale is made.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.models.arithmetic import float32_arithmetic
from vae.models.base import Autoencoder
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian


def scale_latents(latents: Tensor, config: AutoencoderConfig) -> Tensor:
    """Return (latents - shift) * scale of raw latents (B, C, h, w): the input of a diffusion model.

    Shift and scale are `shift_factor` and `scaling_factor`. Where the configuration has `latents_mean` and
    `latents_std`, both per channel, they are `latents_mean` and `scaling_factor / latents_std`, as in diffusers' SDXL
    pipelines. Warns where the scale is assumed because the file that the configuration came from does not state it.
    """
    shift, scale = _shift_and_scale(config, latents)
    return (latents - shift) * scale


def unscale_latents(latents: Tensor, config: AutoencoderConfig) -> Tensor:
    """Return the raw latents (B, C, h, w) of scaled ones: the inverse of `scale_latents`."""
    shift, scale = _shift_and_scale(config, latents)
    return latents / scale + shift


def latents_for(reader: AutoencoderConfig, latents: Tensor, maker: AutoencoderConfig) -> Tensor:
    """Convert raw latents of the autoencoder `maker` to raw latents of the autoencoder `reader`.

    Latents do not change if both have raw ones, or both scaled ones. A decoder of the same family, or a fine-tuned
    one, takes them as they are, whatever scale is written beside it. The latents of a tiny autoencoder are already
    scaled. Between a KL and a tiny one, the result is therefore the latents that a diffusion model sees as the same.
    """
    if reader.latents_are_scaled == maker.latents_are_scaled:
        return latents
    return unscale_latents(scale_latents(latents, maker), reader)


def scale_moments(mean: Tensor, logvar: Tensor, config: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """Convert (mean, logvar) of raw latents, each (B, C, h, w), to those of the scaled latents."""
    return scale_latents(mean, config), logvar + _log_of_squared_scale(config, mean)


def unscale_moments(mean: Tensor, logvar: Tensor, config: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """Convert (mean, logvar) of scaled latents, each (B, C, h, w), to those of the raw latents."""
    return unscale_latents(mean, config), logvar - _log_of_squared_scale(config, mean)


def _log_of_squared_scale(config: AutoencoderConfig, like: Tensor) -> Tensor:
    """Return log(scale²), which scaling adds to a log-variance, in the dtype and on the device of `like`."""
    return (like.new_ones(()) * _shift_and_scale(config, like)[1]).square().log()


def _shift_and_scale(config: AutoencoderConfig, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return (shift, scale): two numbers, or two tensors (C, 1, 1) in the dtype and on the device of `like`.

    Warns where the scale is assumed. The warning points at the caller of `scale_latents` or `unscale_latents`.
    """
    if not config.scale_is_known:
        told = f"scaling factor {config.scaling_factor:g} is assumed, for the file does not tell its family"
        warnings.warn(f"{told}; name it: --family, family= in Python, or vae convert --family once", stacklevel=3)

    if config.latents_mean is None or config.latents_std is None:
        return config.shift_factor or 0.0, config.scaling_factor
    mean, std = (like.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return mean, config.scaling_factor / std


ACTIVE = 0.01  # Burda et al.: a unit whose posterior mean has less variance over the data carries no information


class LatentStatistics:
    """Mean and variance of posterior samples, per channel and over all, and the KL of each channel. Sums are float64.

    The result is exact for any batch sizes and any order (Chan et al., 1979). By the law of total variance, the
    variance of the samples is the variance of the means plus the mean of the variances, so no noise is drawn.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared distances from the mean
        self._noise = torch.zeros(channels, dtype=torch.float64)  # the part of `_squares` that is posterior variance
        self._kl = torch.zeros(channels, dtype=torch.float64)
        self._clamped = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        """Add a batch of posteriors, with mean and log-variance (B, C, h, w)."""
        mean = posterior.mean.detach().double().transpose(0, 1).flatten(1).cpu()  # (channels, elements)
        logvar = posterior.logvar.detach().double().transpose(0, 1).flatten(1).cpu()
        noise = logvar.exp()

        # The batch gets statistics of its own, and merging keeps them exact:
        # one sum of squares over everything would cancel digits.
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
        """Add what `other` has measured, on other images (Chan et al., 1979)."""
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
        """Mean of the latents of each channel. Shape (C,), float64."""
        return self._mean.clone()

    @property
    def channel_std(self) -> Tensor:
        """Standard deviation of the latents of each channel. Shape (C,), float64."""
        return (self._squares / self.count).sqrt()

    @property
    def mean(self) -> float:
        """Mean of the latents over all channels."""
        return self._mean.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation of the latents over all channels, about the mean over all of them."""
        within = (self._squares / self.count).mean()
        between = (self._mean - self._mean.mean()).square().mean()
        return math.sqrt((within + between).item())

    @property
    def scaling_factor(self) -> float:
        """Factor that brings the latents to unit standard deviation: 1 / std, over all channels (LDM, appendix G)."""
        return 1.0 / self.std

    @property
    def channel_kl(self) -> Tensor:
        """KL(q || N(0, I)) of each channel, in nats per latent element. Shape (C,)."""
        return self._kl / self.count

    @property
    def channel_is_active(self) -> Tensor:
        """Whether the variance of a channel's posterior mean over the data exceeds 0.01. Shape (C,), bool.

        This is the criterion of Burda et al., "Importance Weighted Autoencoders" (2016), with a channel taken as one
        unit.
        """
        return (self._squares - self._noise) / self.count > ACTIVE

    @property
    def clamped_share(self) -> float:
        """Share of the log-variances, 0 to 1, that are at the bounds of LOGVAR_RANGE, where they have no gradient."""
        return self._clamped / (self.count * len(self._mean))

    @property
    def has_width(self) -> bool:
        """Whether any channel has a posterior variance above the least possible one.

        A tiny autoencoder has none: all its log-variances are at the lower bound, so its KL means nothing.
        """
        return bool((self._noise / self.count > 2 * math.exp(LOGVAR_RANGE[0])).any())

    def summary(self) -> dict[str, Any]:
        """Return everything measured as plain numbers. `latents_mean` and `latents_std` have one number per channel.

        `kl_per_channel` is absent where the posteriors have no width.
        """
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
@float32_arithmetic()
def measure_latents(model: Autoencoder, batches: Iterable[Tensor]) -> LatentStatistics:
    """Measure the posteriors of `batches` of images (B, C, H, W) in [-1, 1], on the device of `model`."""
    statistics = LatentStatistics(model.config.latent_channels)
    for images in batches:
        statistics.update(model.encode(images))
    return statistics
