"""From images to what the losses need: encoder or teacher, noise, decoder."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from vae.audit.excess import excess_of
from vae.config import TrainConfig
from vae.models.interface import Autoencoder
from vae.models.posterior import DiagonalGaussian
from vae.training.frozen import decoder_learns, posterior_learns
from vae.training.noise import LATENTS
from vae.training.step import Pass
from vae.training.teacher import Teacher

Terms = dict[str, Tensor]


class Autoencoding:
    """(images, their positions) -> Pass, as a run is configured. Frozen parts must be frozen before.

    With a teacher the decoder decodes the teacher's latents, and the encoder learns to make them.
    """

    def __init__(self, autoencoder: Autoencoder, config: TrainConfig) -> None:
        self.autoencoder, self.config = autoencoder, config
        self.posterior_learns = posterior_learns(autoencoder)
        self.decodes = config.teacher is None or decoder_learns(autoencoder)
        self.teacher: Teacher | None = None
        self._encoding = nullcontext if self.posterior_learns else torch.no_grad
        self._draw = LATENTS[config.latents]

    def to(self, device: torch.device) -> None:
        """The networks move with the module that has them; a teacher has none."""
        if self.teacher is not None:
            self.teacher.to(device)

    def __call__(self, positions: list[int], images: Tensor, moments: Tensor | None = None) -> Pass:
        """With the noise of their positions. Where the posterior's `moments` are known the encoder is not run."""
        with self._watched() as beside:
            posterior, decoded = self._encoded(images, moments, beside)
            latents = self._draw(decoded, positions, self.config.seed)
            features = self.autoencoder.decode_features(latents)
            reconstructions = self.autoencoder.to_images(features)
        return Pass(posterior, features, reconstructions, beside)

    def encode(self, images: Tensor) -> Terms:
        """The terms that do not depend on the decoder."""
        with self._watched() as beside:
            self._encoded(images, None, beside)
        return beside

    def _encoded(
        self, images: Tensor, moments: Tensor | None, beside: Terms
    ) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """(own posterior, the one that is decoded). A teacher's is the latter, and the former where none learns."""
        if self.teacher is not None:
            lesson = self.teacher(images)
            if not self.posterior_learns:
                return lesson.raw, lesson.raw
            posterior = self.autoencoder.encode(images)
            beside["latent"] = lesson.distance(posterior)
            return posterior, lesson.raw
        with self._encoding():
            posterior = self.autoencoder.encode(images) if moments is None else DiagonalGaussian.from_moments(moments)
        return posterior, posterior

    @contextmanager
    def _watched(self) -> Iterator[Terms]:
        """Gives the terms that come up within the block, the activations' among them where they have a weight."""
        beside: Terms = {}
        loss = self.config.loss
        if not loss.weights.activation:
            yield beside
            return
        with excess_of(self.autoencoder, loss.activation_limit) as excess:
            yield beside
        if excess.total is not None:
            beside["activation"] = excess.total
