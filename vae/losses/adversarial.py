"""The two sides of the adversarial loss, and the weight that balances it against reconstruction.

The adversarial loss of a training step: what the discriminator asks of reconstructions, and what it learns."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from vae.config.loss import LossConfig
from vae.distributed import mean_over_ranks

ADAPTIVE_EPS = 1e-4  # of taming-transformers and LDM


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    return -fake_logits.mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Lim and Ye, "Geometric GAN" (2017)."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def logistic_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: Goodfellow et al., "Generative Adversarial Nets" (2014), section 3."""
    return F.softplus(-fake_logits).mean()


def logistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


ADVERSARIAL_LOSSES = {
    "hinge": (hinge_generator_loss, hinge_discriminator_loss),
    "logistic": (logistic_generator_loss, logistic_discriminator_loss),
}


def last_layer_gradient(features: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient that `gradient` at the output of the decoder's 3x3 `conv_out` sends to its `weight`.

    One small convolution from that layer's saved input: no second pass through the decoder. In float32 or better.
    """
    features = features.detach().to(gradient.dtype)
    return conv2d_weight(features, list(weight.shape), gradient, padding=1)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float) -> Tensor:
    """|d reconstruction / d w| / |d adversarial / d w| at the decoder's last layer, at most `maximum`.

    Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), equation 7.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, maximum).detach()


def gradient_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """R1: the squared gradient of each real image's summed logits, by the number of those logits; mean over the batch.

    Mescheder et al., "Which Training Methods for GANs do actually Converge?" (2018), without its gamma / 2. A logit's
    gradient reaches its own patch only. So the squared sum grows with the number of patches, while the loss is their
    mean: divided by it, the penalty is that of one patch, and gamma means the same at every size of image.
    """
    logits_of_an_image = real_logits[0].numel()
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean() / logits_of_an_image


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """How far logits run past the running mean of the other side.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (2021), one-sided as in their code.
    """
    return F.relu(real_logits - mean_fake).square().mean() + F.relu(mean_real - fake_logits).square().mean()


class RunningMean(nn.Module):
    """Of a scalar, exponential, starting with the first value: a buffer, so that checkpoints have it.

    `blend` says what the mean would be with `value` and leaves it as it is, `commit` takes in all values since the
    last one: however many micro-batches an update has, its mean moves once, and never by what is not finite.
    """

    value: Tensor
    has_begun: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("has_begun", torch.zeros((), dtype=torch.bool))
        self._pending: list[Tensor] = []

    def blend(self, value: Tensor) -> Tensor:
        value = value.detach()
        self._pending.append(value)
        blended = torch.lerp(value, self.value.to(value.dtype), self.decay)
        return torch.where(torch.isfinite(value), torch.where(self.has_begun, blended, value), self.value)

    def commit(self) -> None:
        if self._pending:
            mean = torch.stack(self._pending).mean()
            self._pending.clear()
            self.value.copy_(self.blend(mean))
            self.has_begun |= torch.isfinite(mean)
            self._pending.clear()

    def discard(self) -> None:
        """What was blended since the last commit: that update was not made."""
        self._pending.clear()


def ramp(updates: int, start: int, length: int) -> float:
    """0 before `start`, then linearly up to 1 within `length` updates (at once for 0)."""
    if updates < start:
        return 0.0
    return min(1.0, (updates - start + 1) / length) if length else 1.0


Logs = dict[str, Tensor]
Augment = Callable[[Tensor], Tensor]
LECAM_DECAY = 0.999  # Tseng et al.
SMALLEST = 1e-30  # of a norm to divide by, in what is logged


def unchanged(images: Tensor) -> Tensor:
    return images


def zero_touching(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Zero, but of every parameter: DDP wants to see each in every backward."""
    return 0.0 * torch.stack([parameter.flatten()[0] for parameter in parameters]).sum()


class AdversarialLoss(nn.Module):
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

    def zero_loss(self) -> Tensor:
        return zero_touching(self.discriminator.parameters())

    def commit(self) -> None:
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.commit()

    def discard(self) -> None:
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.discard()


def _summary(real_logits: Tensor, fake_logits: Tensor) -> Logs:
    """What tells a game from a walk-over: mean logits, their gap, and how often the discriminator is right."""
    real, fake = real_logits.mean(), fake_logits.mean()
    right = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
    return {"real_logits": real, "fake_logits": fake, "logit_gap": real - fake, "discriminator_accuracy": right}
