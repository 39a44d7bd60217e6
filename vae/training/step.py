"""One training step: a single pass through the autoencoder that serves the generator's and the discriminator's update.

The losses are differentiated at the reconstructions, once each. The scalar returned has exactly the gradient of

    pixel + perceptual + kl + adaptive_weight * ramp * adversarial      in the autoencoder's parameters,
    discriminator loss on detached reconstructions                      in the discriminator's,

which is LDM's objective (Rombach et al., 2022, appendix G) evaluated for both networks at the same weights and noise.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from vae.losses.adversarial import ADVERSARIAL_LOSSES, adaptive_weight, last_layer_gradient, ramp
from vae.losses.objective import LossConfig, Objective, weighted_sum
from vae.models.posterior import DiagonalGaussian, at_least_float32

Logs = dict[str, Tensor]


class AdversarialGame:
    """The discriminator's two parts in a step: what it asks of the reconstructions, and what it learns from them."""

    def __init__(self, discriminator: nn.Module, config: LossConfig, last_layer: nn.Conv2d) -> None:
        self.discriminator, self.config, self.last_layer = discriminator, config, last_layer
        self.generator_loss, self.discriminator_loss = ADVERSARIAL_LOSSES[config.adversarial]

    def gradient(
        self, leaf: Tensor, reconstruction_gradient: Tensor, features: Tensor, scale: float
    ) -> tuple[Tensor, Logs]:
        """The weighted adversarial gradient at the reconstructions. The discriminator is held constant."""
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = self.generator_loss(functional_call(self.discriminator, constant, (leaf,)))
        (gradient,) = torch.autograd.grad(adversarial, leaf)
        balance = torch.ones((), device=leaf.device, dtype=leaf.dtype)
        if self.config.adaptive:
            at_last_layer = [
                last_layer_gradient(features, self.last_layer.weight, g) for g in (reconstruction_gradient, gradient)
            ]
            ours, theirs = _mean_over_ranks(torch.stack(at_last_layer))
            balance = adaptive_weight(ours, theirs, self.config.adaptive_maximum / leaf[0].numel())
        logs = {"adversarial": adversarial.detach(), "adaptive_weight": balance}
        return scale * self.config.weights.adversarial * balance * gradient, logs

    def loss(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Logs]:
        """Real and fake in one concatenated forward."""
        real_logits, fake_logits = self.discriminator(torch.cat([images, reconstructions])).chunk(2)
        loss = self.discriminator_loss(real_logits, fake_logits)
        logs = {"discriminator": loss, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    def sleep(self) -> Tensor:
        """Zero, but of every parameter: DDP wants to see each in every backward."""
        return 0.0 * torch.stack([parameter.flatten()[0] for parameter in self.discriminator.parameters()]).sum()


def single_pass(
    images: Tensor,
    autoencode: Callable[[Tensor], tuple[DiagonalGaussian, Tensor, Tensor]],
    objective: Objective,
    game: AdversarialGame | None,
    updates: int,
) -> tuple[Tensor, Logs]:
    """(scalar to call backward on, raw terms to log). Its value means nothing, its gradient everything.

    `autoencode(images)` gives the posterior, the last layer's input and the reconstructions.
    """
    posterior, features, reconstructions = autoencode(images)
    with torch.autocast(images.device.type, enabled=False):
        leaf = at_least_float32(reconstructions.detach()).requires_grad_()
        terms = objective(images, leaf, posterior)
        logs = {name: term.detach() for name, term in terms.items()}
        kl = weighted_sum({"kl": terms.pop("kl")}, objective.weights) if "kl" in terms else 0.0
        (gradient,) = torch.autograd.grad(weighted_sum(terms, objective.weights), leaf)
        discriminator_loss: Tensor | float = 0.0
        if game is not None:
            config = game.config
            scale = ramp(updates, config.adversarial_start, config.adversarial_ramp)
            if scale > 0:
                adversarial_gradient, more = game.gradient(leaf, gradient, features, scale)
                gradient, logs = gradient + adversarial_gradient, logs | more
            if updates >= config.discriminator_start:
                discriminator_loss, more = game.loss(images, leaf.detach())
                logs |= more
            else:
                discriminator_loss = game.sleep()
        return (at_least_float32(reconstructions) * gradient).sum() + kl + discriminator_loss, logs


def _mean_over_ranks(gradients: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradients)
        gradients = gradients / dist.get_world_size()
    return gradients
