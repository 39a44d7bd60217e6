"""The adversarial game of a training step: what the discriminator asks of reconstructions, and what it learns."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    RunningMean,
    adaptive_weight,
    gradient_penalty,
    last_layer_gradient,
    lecam_penalty,
)
from vae.losses.objective import LossConfig
from vae.training.ranks import mean_over_ranks

Logs = dict[str, Tensor]
Augment = Callable[[Tensor], Tensor]
LECAM_DECAY = 0.999  # Tseng et al.
SMALLEST = 1e-30  # of a norm to divide by, in what is logged


def unchanged(images: Tensor) -> Tensor:
    return images


def asleep(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Zero, but of every parameter: DDP wants to see each in every backward."""
    return 0.0 * torch.stack([parameter.flatten()[0] for parameter in parameters]).sum()


class AdversarialGame(nn.Module):
    """The discriminator's two parts in a step: what it asks of the reconstructions, and what it learns from them.

    As a module it holds running means only; the networks belong to others.
    """

    def __init__(self, discriminator: nn.Module, config: LossConfig, last_layer: nn.Conv2d) -> None:
        super().__init__()
        self.balance = RunningMean(config.adaptive_smoothing)
        self.real_logit, self.fake_logit = RunningMean(LECAM_DECAY), RunningMean(LECAM_DECAY)
        self._networks = (discriminator, last_layer)
        self.config = config
        self.generator_loss, self.discriminator_loss = ADVERSARIAL_LOSSES[config.adversarial]

    @property
    def discriminator(self) -> nn.Module:
        return self._networks[0]

    def gradient(
        self,
        leaf: Tensor,
        reconstruction_gradient: Tensor,
        features: Tensor,
        scale: float,
        augment: Augment = unchanged,
    ) -> tuple[Tensor, Logs]:
        """The weighted adversarial gradient at the reconstructions. The discriminator is held constant.

        `adversarial_share` tells how much of what its weight asks for the adversary has at the last layer: 1 where the
        adaptive weight makes both gradients equal there, less where its bound holds it back.
        """
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = self.generator_loss(functional_call(self.discriminator, constant, (augment(leaf),)))
        (gradient,) = torch.autograd.grad(adversarial, leaf)
        logs: Logs = {}
        balance = torch.ones((), device=leaf.device, dtype=leaf.dtype)
        if self.config.adaptive:
            weight = self._networks[1].weight
            at_last_layer = [last_layer_gradient(features, weight, g) for g in (reconstruction_gradient, gradient)]
            ours, theirs = mean_over_ranks(torch.stack(at_last_layer))
            ratio = adaptive_weight(ours, theirs, self.config.bound_of(leaf[0].numel()))
            balance = self.balance.blend(ratio)
            logs["adversarial_share"] = balance * theirs.norm() / ours.norm().clamp_min(SMALLEST)
        logs |= {"adversarial": adversarial.detach(), "adaptive_weight": balance}
        return scale * self.config.weights.adversarial * balance * gradient, logs

    def loss(self, images: Tensor, reconstructions: Tensor, augment: Augment = unchanged) -> tuple[Tensor, Logs]:
        """What the discriminator learns by, from images and detached reconstructions."""
        config = self.config
        images = images.detach().requires_grad_(config.r1 > 0)
        real_logits, fake_logits = self._judge(augment(images), augment(reconstructions))
        loss = self.discriminator_loss(real_logits, fake_logits)
        logs = {"discriminator": loss.detach()} | _summary(real_logits.detach(), fake_logits.detach())
        if config.r1:
            logs["r1"] = gradient_penalty(real_logits, images)
            loss = loss + 0.5 * config.r1 * logs["r1"]
        if config.lecam:
            means = mean_over_ranks(torch.stack([logs["real_logits"], logs["fake_logits"]]))
            mean_real, mean_fake = self.real_logit.blend(means[0]), self.fake_logit.blend(means[1])
            logs["lecam"] = lecam_penalty(real_logits, fake_logits, mean_real, mean_fake)
            loss = loss + config.lecam * logs["lecam"]
        return loss, {name: value.detach() for name, value in logs.items()}

    def _judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both: in one concatenated forward, or each by itself where a norm mixes the images of a batch.

        The autoencoder is judged on reconstructions alone. With statistics of real images among theirs the
        discriminator would learn as one function and judge as another; LDM has two forwards for that reason.
        """
        if self.config.discriminator.mixes_images:
            return self.discriminator(real), self.discriminator(fake)
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        return real_logits, fake_logits

    def sleep(self) -> Tensor:
        return asleep(self.discriminator.parameters())

    def commit(self) -> None:
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.commit()

    def forget(self) -> None:
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.forget()


def _summary(real_logits: Tensor, fake_logits: Tensor) -> Logs:
    """What tells a game from a walk-over: mean logits, their gap, and how often the discriminator is right."""
    real, fake = real_logits.mean(), fake_logits.mean()
    right = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
    return {"real_logits": real, "fake_logits": fake, "logit_gap": real - fake, "discriminator_accuracy": right}
