"""One training step: a single pass through the autoencoder that serves the generator's and the discriminator's update.

`ForwardPass` goes from images to what the losses need: encoder or teacher, noise, decoder. `single_pass`
differentiates the losses at the reconstructions, once each. The scalar that it returns has exactly the gradient of

    pixel + perceptual + kl + adaptive_weight * ramp * adversarial      in the autoencoder's parameters,
    discriminator loss on detached reconstructions                      in the discriminator's,

which is LDM's objective (Rombach et al., 2022, appendix G) evaluated for both networks at the same weights and
noise.

The random numbers of an image are a function of the seed and the image's position in the data order. They do not
depend on its batch, its process, or a restart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.sampler import seed_for
from vae.errors import require
from vae.latents import scale_moments, unscale_moments
from vae.losses.adversarial import AdversarialLoss, Augment, Logs, unchanged, zero_touching
from vae.losses.autoencoder_loss import Objective, latent_distance, ramp
from vae.models.base import Autoencoder
from vae.models.posterior import DiagonalGaussian, at_least_float32
from vae.precision.audit import excess_of
from vae.training.optim import decoder_learns, posterior_learns

POSTERIOR, AUGMENTATION = 1, 2  # streams of random numbers; crops use the position alone, without a stream


def sampled(posterior: DiagonalGaussian, positions: list[int], seed: int) -> Tensor:
    """Return a sample of the posterior, with the noise of each image's position."""
    return posterior.reparameterize(normal_for(positions, seed, posterior.mean))


def mean(posterior: DiagonalGaussian, *_: object) -> Tensor:
    """Return the posterior's mean, without noise."""
    return posterior.mode()


Latents = Callable[[DiagonalGaussian, list[int], int], Tensor]  # (posterior, positions, seed) -> (B, C, h, w)
LATENTS: dict[str, Latents] = {"sampled": sampled, "mean": mean}  # what the decoder is trained on


def normal_for(positions: list[int], seed: int, like: Tensor) -> Tensor:
    """Return standard normal noise of the shape of `like` (B, ...), for the posterior of the images at `positions`."""
    return torch.stack(
        [
            torch.randn(like.shape[1:], generator=generator, device=like.device, dtype=like.dtype)
            for generator in _generators(positions, seed, POSTERIOR, like.device)
        ]
    )


def uniform_for(positions: list[int], seed: int, count: int, like: Tensor) -> Tensor:
    """Return `count` numbers in [0, 1) for each image, (B, count), for the discriminator's augmentation.

    They are on the device of `like`.
    """
    generators = _generators(positions, seed, AUGMENTATION, like.device)
    return torch.stack([torch.rand(count, generator=generator, device=like.device) for generator in generators])


def _generators(positions: list[int], seed: int, stream: int, device: torch.device) -> Iterator[torch.Generator]:
    """Yield the generator of each position: one object, seeded anew, so its numbers must be drawn at once."""
    generator = torch.Generator(device)
    for position in positions:
        yield generator.manual_seed(seed_for(seed, position, stream))


class Teacher:
    """A frozen autoencoder whose latents the student is to learn.

    This is deliberately not a module: it belongs to no optimiser, checkpoint or DDP bucket.

    Its latents and the student's are the same as diffusion models see them: each has its own scaling of raw latents.
    A tiny autoencoder's raw latents are scaled already. Raises InputError if channels or downsampling factor differ.
    """

    def __init__(self, model: Autoencoder, student: AutoencoderConfig) -> None:
        theirs, ours = (_latents_of(config) for config in (model.config, student))
        given = f"model with {ours[0]} latent channels and factor {ours[1]}"
        require(theirs == ours, given, f"the teacher's {theirs[0]} channels and factor {theirs[1]}")
        self.model = model.requires_grad_(False).eval()

        # A scale that is a guess is used as if it were known: the run has reported it.
        self.scale, self.student = model.config.taking_its_scale(), student.taking_its_scale()

    def to(self, device: torch.device) -> "Teacher":
        """Move the network to `device` and return the teacher itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> "TeacherPosterior":
        """Return the teacher's posterior of images (B, C, H, W) in [-1, 1].

        It is computed in the teacher's own precision, whatever the precision of the run.
        """
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.model.encode(images.to(next(self.model.parameters()).dtype))

        mean, logvar = scale_moments(posterior.mean, posterior.logvar, self.scale)
        return TeacherPosterior(DiagonalGaussian(mean, logvar), self.student)


class TeacherPosterior(NamedTuple):
    """A teacher's posterior of some images; `scaled` is in the units of the latents that diffusion models see."""

    scaled: DiagonalGaussian
    student: AutoencoderConfig

    @property
    def raw(self) -> DiagonalGaussian:
        """The posterior in the student's raw units: what its decoder is to decode."""
        return DiagonalGaussian(*unscale_moments(self.scaled.mean, self.scaled.logvar, self.student))

    def distance(self, posterior: DiagonalGaussian) -> Tensor:
        """Return the distance to the student's raw `posterior`.

        It is measured in scaled units, in which latents have a standard deviation of about 1.
        """
        ours = DiagonalGaussian(*scale_moments(posterior.mean, posterior.logvar, self.student))
        return latent_distance(ours, self.scaled)


def _latents_of(config: AutoencoderConfig) -> tuple[int, int]:
    """Return the latent channels and the downsampling factor."""
    return config.latent_channels, config.downsample_factor


class Output(NamedTuple):
    """What the autoencoder makes of images.

    `features` (B, C, H, W) are the input of the decoder's last layer. `reconstructions` are (B, C, H, W), not
    clamped. `extra_terms` are raw terms that were computed on the way: latent, activation.
    """

    posterior: DiagonalGaussian
    features: Tensor  # the last layer's input
    reconstructions: Tensor
    extra_terms: Mapping[str, Tensor] = MappingProxyType({})


def single_pass(  # noqa: PLR0917
    images: Tensor,
    autoencode: Callable[[Tensor], Output],
    objective: Objective,
    adversarial_loss: AdversarialLoss | None,
    updates: int,
    augment: Augment = unchanged,
) -> tuple[Tensor, Logs]:
    """Return a scalar to call backward on, and raw terms to log. Its value means nothing, its gradient everything.

    `images` are (B, C, H, W) in [-1, 1], `updates` is the clock. What the discriminator sees goes through `augment`.
    """
    posterior, features, reconstructions, extra_terms = autoencode(images)
    with torch.autocast(images.device.type, enabled=False):
        # The losses are differentiated at this leaf, so no loss goes back through the decoder by itself.
        leaf = at_least_float32(reconstructions.detach()).requires_grad_()
        terms = objective.of_images(images, leaf)
        (gradient,) = torch.autograd.grad(objective.weighted_sum(terms, updates), leaf)

        # Terms of latents or activations go into the backward as they are.
        regularisers = objective.of_posterior(posterior, images) | dict(extra_terms)
        regularisation = objective.weighted_sum(regularisers, updates)
        logs = detached(terms | regularisers)

        discriminator_loss: Tensor | float = 0.0
        if adversarial_loss is not None:
            config = adversarial_loss.config
            scale = ramp(updates, config.adversarial_start, config.adversarial_ramp)
            if scale > 0:
                adversarial_gradient, more = adversarial_loss.gradient(leaf, gradient, features, scale, augment)
                gradient, logs = gradient + adversarial_gradient, logs | more

            if updates >= config.discriminator_start:
                discriminator_loss, more = adversarial_loss.loss(images, leaf.detach(), augment)
                logs |= more
            else:
                discriminator_loss = adversarial_loss.zero_loss()

        # The product's gradient in the reconstructions is `gradient`: one backward applies it to the autoencoder.
        return (at_least_float32(reconstructions) * gradient).sum() + regularisation + discriminator_loss, logs


def warm_up(
    images: Tensor,
    autoencode: Callable[[Tensor], Output],
    adversarial_loss: AdversarialLoss,
    asleep_meanwhile: Iterable[nn.Parameter],
    augment: Augment = unchanged,
) -> tuple[Tensor, Logs]:
    """Return a scalar in whose gradient only the discriminator learns, and terms to log.

    This takes the place of `single_pass` before the autoencoder starts to learn. `asleep_meanwhile` are the
    autoencoder's parameters, which stay as they are.
    """
    with torch.no_grad():
        reconstructions = autoencode(images).reconstructions
    with torch.autocast(images.device.type, enabled=False):
        loss, logs = adversarial_loss.loss(images, at_least_float32(reconstructions), augment)
        return loss + zero_touching(asleep_meanwhile), logs


def detached(terms: Mapping[str, Tensor]) -> Logs:
    """Return the terms without their gradients."""
    return {name: term.detach() for name, term in terms.items()}


Terms = dict[str, Tensor]


class ForwardPass:
    """(images, their positions) -> Output, as a run is configured. Parts must be frozen before it is built.

    With a teacher the decoder decodes the teacher's latents, and the encoder learns to make them.
    """

    def __init__(self, autoencoder: Autoencoder, config: TrainConfig) -> None:
        self.autoencoder = autoencoder
        self.config = config
        self.posterior_learns = posterior_learns(autoencoder)
        self.decodes = config.teacher is None or decoder_learns(autoencoder)
        self.teacher: Teacher | None = None
        self._encoding = nullcontext if self.posterior_learns else torch.no_grad
        self._draw = LATENTS[config.latents]

    def to(self, device: torch.device) -> None:
        """Move the teacher to `device`. It has no module that moves it; the other networks have one."""
        if self.teacher is not None:
            self.teacher.to(device)

    def __call__(self, positions: list[int], images: Tensor, moments: Tensor | None = None) -> Output:
        """Encode and decode images (B, C, H, W) in [-1, 1], with the noise of their positions.

        If the `moments` of the posterior are known, (B, 2 * latent, H/f, W/f), the encoder is not run.
        """
        with self._watched() as extra_terms:
            posterior, decoded = self._encoded(images, moments, extra_terms)
            latents = self._draw(decoded, positions, self.config.seed)
            features = self.autoencoder.decode_features(latents)
            reconstructions = self.autoencoder.to_images(features)
        return Output(posterior, features, reconstructions, extra_terms)

    def encode(self, images: Tensor) -> Terms:
        """Return the terms that do not depend on the decoder, without decoding."""
        with self._watched() as extra_terms:
            self._encoded(images, None, extra_terms)
        return extra_terms

    def _encoded(
        self, images: Tensor, moments: Tensor | None, extra_terms: Terms
    ) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """Return the autoencoder's own posterior, and the posterior that is decoded.

        With a teacher the second is the teacher's, and so is the first if the encoder does not learn.
        """
        if self.teacher is not None:
            target = self.teacher(images)
            if not self.posterior_learns:
                return target.raw, target.raw
            posterior = self.autoencoder.encode(images)
            extra_terms["latent"] = target.distance(posterior)
            return posterior, target.raw

        with self._encoding():
            posterior = self.autoencoder.encode(images) if moments is None else DiagonalGaussian.from_moments(moments)
        return posterior, posterior

    @contextmanager
    def _watched(self) -> Iterator[Terms]:
        """Give a mapping to which the terms of the block are added.

        The activation term is added at the end of the block if it has a weight.
        """
        extra_terms: Terms = {}
        loss = self.config.loss
        if not loss.weights.activation:
            yield extra_terms
            return

        with excess_of(self.autoencoder, loss.activation_limit) as excess:
            yield extra_terms
        if excess.total is not None:
            extra_terms["activation"] = excess.total
