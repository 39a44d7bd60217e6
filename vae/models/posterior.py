"""The posterior: the encoder's output as a distribution over latents."""

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of LDM and diffusers; its gradient is zero outside


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DiagonalGaussian:
    """q(z | x) = N(mean, exp(logvar)), elementwise; `mean` and `logvar` are (B, latent_channels, H/f, W/f).

    Kingma and Welling, "Auto-Encoding Variational Bayes" (2014). Arithmetic is in float32 or better.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        assert mean.shape == logvar.shape
        self.mean = at_least_float32(mean)
        self.logvar = at_least_float32(logvar).clamp(*LOGVAR_RANGE)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Make a posterior of moments (B, 2 * latent_channels, H/f, W/f): mean first, then logvar."""
        mean, logvar = at_least_float32(moments).chunk(2, dim=1)
        return cls(mean, logvar)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each latent element, of the mean's shape."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """Return the most likely latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents, differentiable in mean and logvar. `generator` must live on the posterior's device."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.reparameterize(noise)

    def reparameterize(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise, for standard normal `noise` of the latents' shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Return KL(q || N(0, I)) in nats per image, summed over latent elements. Shape (B,)."""
        per_element = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return per_element.flatten(1).sum(dim=1)
