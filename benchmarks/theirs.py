"""diffusers' AutoencoderKL with our weights, and the training steps of two peers around it.

The steps are re-creations of structure, not anybody's code: which forwards, backwards and synchronisations a generator
and a discriminator update consist of, in diffusers' train_autoencoderkl.py and in the LDM / sgm code. LPIPS and the
discriminator are the same modules as ours. No side has EMA weights or data loading.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from diffusers.utils.logging import set_verbosity_error
from torch import Tensor, nn

from vae.config.schema import TrainConfig
from vae.losses.adversarial import ADAPTIVE_EPS, hinge_discriminator_loss
from vae.models.base import Autoencoder
from vae.models.lpips import LPIPS
from vae.models.posterior import at_least_float32
from vae.weights.formats import to_diffusers_config

Terms = dict[str, Tensor]


def authority(ours: Autoencoder) -> Any:
    """diffusers' own network of the same architecture with the same weights (untyped upstream)."""
    set_verbosity_error()  # it warns at every change of type
    theirs: Any = Authority.from_config(to_diffusers_config(ours.config))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.to(next(ours.parameters()))


class PeerStep:
    """What both have in common: losses summed over an image, the adaptive weight through the graph, two optimisers."""

    def __init__(
        self,
        networks: tuple[Any, nn.Module],
        lpips: LPIPS,
        config: TrainConfig,
        autocast: torch.dtype | None,
        optimiser: type[torch.optim.Adam] = torch.optim.Adam,
    ) -> None:
        (self.vae, self.discriminator), self.lpips = networks, lpips
        self.weights, self.bound_of = config.loss.weights, config.loss.bound_of
        self.clip, self.autocast = config.optim.gradient_clip, autocast
        rate, betas = config.optim.learning_rate, (config.optim.betas[0], config.optim.betas[1])
        self.optimisers = [optimiser(network.parameters(), lr=rate, betas=betas) for network in networks]

    def precision(self, images: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(images.device.type, self.autocast)

    def reconstruct(self, images: Tensor, noise: Tensor | None) -> tuple[Any, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        return posterior, self.vae.decode(latents).sample

    def combined(self, images: Tensor, reconstructions: Tensor, perceptual: Tensor, posterior: Any) -> Terms:
        """The generator's terms, and the loss that adds them up."""
        pixel = (at_least_float32(reconstructions) - at_least_float32(images)).abs()
        nll = (pixel + self.weights.perceptual * perceptual.view(-1, 1, 1, 1)).sum() / len(images)
        kl = posterior.kl().sum() / len(images)
        adversarial = -self.discriminator(reconstructions).mean()
        last = self.vae.decoder.conv_out.weight
        (nll_gradient,) = torch.autograd.grad(nll, last, retain_graph=True)
        (gradient,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        elements = images[0].numel()
        limit = self.bound_of(elements) * elements  # of losses that are sums
        balance = (nll_gradient.norm() / (gradient.norm() + ADAPTIVE_EPS)).clamp(0.0, limit).detach()
        loss = nll + self.weights.kl * kl + balance * self.weights.adversarial * adversarial
        parts = {"pixel": pixel.mean(), "perceptual": perceptual.mean(), "kl": kl / images[0].numel()}
        weight = balance / images[0].numel()  # of losses that are means
        return {"loss": loss, **parts, "adversarial": adversarial, "adaptive_weight": weight, "nll": nll}

    def discriminated(self, images: Tensor, reconstructions: Tensor) -> Terms:
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        loss = hinge_discriminator_loss(real, fake)
        return {"loss": loss, "discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}

    def generator(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        raise NotImplementedError

    def judge(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        raise NotImplementedError

    def __call__(self, images: Tensor) -> None:
        """One update of each network."""
        for update, optimiser in zip((self.generator, self.judge), self.optimisers, strict=True):
            update(images)
            optimiser.step()
            optimiser.zero_grad()


class ScriptStep(PeerStep):
    """diffusers' script: a whole pass through the autoencoder, forward and backward, for either update.

    LPIPS is without gradients there, so this does less useful work than the others; the discriminator's loss goes back
    through the autoencoder, whose leaked gradients enter its next update; every logged number is waited for.
    `autocast=None` with half weights is what the script does under mixed precision: it casts the weights.
    """

    def __init__(self, networks: tuple[Any, nn.Module], lpips: LPIPS, config: TrainConfig, autocast: Any) -> None:
        super().__init__(networks, lpips, config, autocast, torch.optim.AdamW)

    def generator(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        images = images.to(self.vae.dtype)
        with self.precision(images):
            posterior, reconstructions = self.reconstruct(images, noise)
            with torch.no_grad(), _for_lpips(images):
                perceptual = self.lpips(reconstructions, images)
            terms = self.combined(images, reconstructions, perceptual, posterior)
        return self._backward(terms, self.vae)

    def judge(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        images = images.to(self.vae.dtype)
        with self.precision(images):
            terms = self.discriminated(images, self.reconstruct(images, noise)[1])
        return self._backward(terms, self.discriminator)

    def _backward(self, terms: Terms, network: nn.Module) -> Terms:
        logs = [value.detach().mean().item() for value in terms.values()]
        assert len(logs) == len(terms)
        terms["loss"].backward()
        if self.clip:
            nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        return terms


class LdmStep(PeerStep):
    """LDM and sgm: the other network is frozen in either update, the autoencoder is run a second time without a graph.

    LPIPS and the discriminator are gone back through twice, for the adaptive weight and for the loss; LPIPS is computed
    for the discriminator's update too, and not used. No gradient is clipped.
    """

    def generator(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        _set_learning(self.vae, self.discriminator)
        with self.precision(images):
            posterior, reconstructions = self.reconstruct(images, noise)
            terms = self.combined(images, reconstructions, self.lpips(images, reconstructions), posterior)
        terms["loss"].backward()
        return terms

    def judge(self, images: Tensor, noise: Tensor | None = None) -> Terms:
        _set_learning(self.discriminator, self.vae)
        with self.precision(images):
            _, reconstructions = self.reconstruct(images, noise)
            self.lpips(images, reconstructions)
            terms = self.discriminated(images.detach(), reconstructions.detach())
        terms["loss"].backward()
        return terms


def _set_learning(learning: nn.Module, frozen: nn.Module) -> None:
    learning.requires_grad_(True)
    frozen.requires_grad_(False)


def _for_lpips(images: Tensor) -> AbstractContextManager[object]:
    """Ours has float32 weights: of half images, features in half precision."""
    is_half = images.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(images.device.type, images.dtype) if is_half else nullcontext()
