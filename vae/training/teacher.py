"""Another autoencoder, whose latents are to be learned."""

from typing import NamedTuple

import torch
from torch import Tensor

from vae.errors import require
from vae.latents import scale_moments, unscale_moments
from vae.losses.latent import latent_distance
from vae.models.autoencoder import AutoencoderConfig
from vae.models.interface import Autoencoder
from vae.models.posterior import DiagonalGaussian


class Teacher:
    """Frozen; not a module, on purpose: it belongs to no optimiser, no checkpoint and no DDP bucket.

    Its latents and the student's are the same as diffusion models see them: each has its own scaling of raw ones. A
    tiny autoencoder's raw latents are scaled ones already.
    """

    def __init__(self, model: Autoencoder, student: AutoencoderConfig) -> None:
        theirs, ours = (_latents_of(config) for config in (model.config, student))
        given = f"model with {ours[0]} latent channels and factor {ours[1]}"
        require(theirs == ours, given, f"the teacher's {theirs[0]} channels and factor {theirs[1]}")
        self.model = model.requires_grad_(False).eval()
        self.scale, self.student = model.config.taking_its_scale(), student.taking_its_scale()  # a run has said it

    def to(self, device: torch.device) -> "Teacher":
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> "Lesson":
        """Of images (B, C, H, W) in [-1, 1]; in the teacher's own precision, whatever the run's is."""
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.model.encode(images.to(next(self.model.parameters()).dtype))
        mean, logvar = scale_moments(posterior.mean, posterior.logvar, self.scale)
        return Lesson(DiagonalGaussian(mean, logvar), self.student)


class Lesson(NamedTuple):
    """A teacher's posterior of some images, `scaled` as diffusion models see latents."""

    scaled: DiagonalGaussian
    student: AutoencoderConfig

    @property
    def raw(self) -> DiagonalGaussian:
        """In the student's units: what its decoder is to decode."""
        return DiagonalGaussian(*unscale_moments(self.scaled.mean, self.scaled.logvar, self.student))

    def distance(self, posterior: DiagonalGaussian) -> Tensor:
        """Of the student's raw `posterior`, in scaled units, where latents have a spread of about 1."""
        ours = DiagonalGaussian(*scale_moments(posterior.mean, posterior.logvar, self.student))
        return latent_distance(ours, self.scaled)


def _latents_of(config: AutoencoderConfig) -> tuple[int, int]:
    return config.latent_channels, config.downsample_factor
