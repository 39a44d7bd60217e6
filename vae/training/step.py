"""One training step: a single pass through the autoencoder that serves the generator's and the discriminator's update.

The losses are differentiated at the reconstructions, once each. The scalar returned has exactly the gradient of

    pixel + perceptual + kl + adaptive_weight * ramp * adversarial      in the autoencoder's parameters,
    discriminator loss on detached reconstructions                      in the discriminator's,

which is LDM's objective (Rombach et al., 2022, appendix G) evaluated for both networks at the same weights and noise.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.losses.adversarial import ramp
from vae.losses.objective import Objective, weighted_sum
from vae.models.posterior import DiagonalGaussian, at_least_float32
from vae.training.game import AdversarialGame, Augment, Logs, asleep, unchanged

BESIDE = ("kl", "latent", "activation")  # terms that do not depend on the reconstructions


class Pass(NamedTuple):
    """What the autoencoder makes of images; `beside` are raw terms that came up on the way."""

    posterior: DiagonalGaussian
    features: Tensor  # the last layer's input
    reconstructions: Tensor
    beside: Mapping[str, Tensor] = MappingProxyType({})


def single_pass(  # noqa: PLR0917
    images: Tensor,
    autoencode: Callable[[Tensor], Pass],
    objective: Objective,
    game: AdversarialGame | None,
    updates: int,
    augment: Augment = unchanged,
) -> tuple[Tensor, Logs]:
    """(scalar to call backward on, raw terms to log). Its value means nothing, its gradient everything.

    What the discriminator sees goes through `augment`.
    """
    posterior, features, reconstructions, beside = autoencode(images)
    with torch.autocast(images.device.type, enabled=False):
        leaf = at_least_float32(reconstructions.detach()).requires_grad_()
        terms = objective(images, leaf, posterior) | dict(beside)
        logs = detached(terms)
        regularisation = regularise(terms, objective, updates)
        of_images = {name: term for name, term in terms.items() if name not in BESIDE}
        (gradient,) = torch.autograd.grad(weighted_sum(of_images, objective.weights), leaf)
        discriminator_loss: Tensor | float = 0.0
        if game is not None:
            config = game.config
            scale = ramp(updates, config.adversarial_start, config.adversarial_ramp)
            if scale > 0:
                adversarial_gradient, more = game.gradient(leaf, gradient, features, scale, augment)
                gradient, logs = gradient + adversarial_gradient, logs | more
            if updates >= config.discriminator_start:
                discriminator_loss, more = game.loss(images, leaf.detach(), augment)
                logs |= more
            else:
                discriminator_loss = game.sleep()
        return (at_least_float32(reconstructions) * gradient).sum() + regularisation + discriminator_loss, logs


def warm_up(
    images: Tensor,
    autoencode: Callable[[Tensor], Pass],
    game: AdversarialGame,
    asleep_meanwhile: Iterable[nn.Parameter],
    augment: Augment = unchanged,
) -> tuple[Tensor, Logs]:
    """The discriminator learns what the autoencoder makes, which stays as it is: `single_pass` before it starts."""
    with torch.no_grad():
        reconstructions = autoencode(images).reconstructions
    with torch.autocast(images.device.type, enabled=False):
        loss, logs = game.loss(images, at_least_float32(reconstructions), augment)
        return loss + asleep(asleep_meanwhile), logs


def detached(terms: Mapping[str, Tensor]) -> Logs:
    return {name: term.detach() for name, term in terms.items()}


def regularise(terms: Mapping[str, Tensor], objective: Objective, updates: int) -> Tensor:
    """The weighted sum of those terms that do not depend on the reconstructions."""
    beside = {name: terms[name] for name in BESIDE if name in terms}
    if "kl" in beside:
        beside["kl"] = ramp(updates, 0, objective.kl_warmup) * beside["kl"]
    return weighted_sum(beside, objective.weights) if beside else torch.zeros(())
