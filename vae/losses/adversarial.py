"""The adversarial loss: what the discriminator asks of reconstructions, and what it learns from them.

The formulas come first: generator and discriminator losses, the adaptive weight that balances the adversarial term
against reconstruction, and the penalties on the discriminator. `AdversarialLoss` puts them together for a training
step.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from vae.config.loss import LossConfig
from vae.distributed import mean_over_ranks

ADAPTIVE_EPS = 1e-4  # as in taming-transformers and LDM


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the negative mean of the logits. It is the same for Wasserstein and hinge discriminators."""
    return -fake_logits.mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return half the sum of the hinge terms: real logits should be above 1, fake ones below -1.

    Lim and Ye, "Geometric GAN" (2017). The factor of one half is LDM's.
    """
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def logistic_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss, softplus(-logits), mean over all logits.

    Goodfellow et al., "Generative Adversarial Nets" (2014), section 3.
    """
    return F.softplus(-fake_logits).mean()


def logistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return half the sum of the binary cross-entropies of real logits against 1 and of fake ones against 0."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


ADVERSARIAL_LOSSES = {
    "hinge": (hinge_generator_loss, hinge_discriminator_loss),
    "logistic": (logistic_generator_loss, logistic_discriminator_loss),
}


def last_layer_gradient(features: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the weight of the decoder's last layer, a 3x3 `conv_out`.

    `features` are that layer's input (B, C, H, W), `weight` is its kernel, `gradient` the gradient at its output.
    This is one small convolution of the saved input: there is no second pass through the decoder. It is computed in
    the type of `gradient`, float32 or better.
    """
    features = features.detach().to(gradient.dtype)
    return conv2d_weight(features, list(weight.shape), gradient, padding=1)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float) -> Tensor:
    """Return |d reconstruction / d w| / |d adversarial / d w| at the decoder's last layer, at most `maximum`.

    The arguments are the two gradients of that layer's weight w. The result is a scalar without gradient. Esser et
    al., "Taming Transformers for High-Resolution Image Synthesis" (2021), equation 7.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, maximum).detach()


def gradient_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Return R1, mean over the batch: the squared gradient of an image's summed logits, divided by their number.

    `real_logits` must depend on `images`, which must require a gradient. Mescheder et al., "Which Training Methods
    for GANs do actually Converge?" (2018), without its gamma / 2. The gradient of a logit reaches its own patch
    only. So the squared sum grows with the number of patches, while the loss is their mean. Divided by that number,
    the penalty is that of one patch, and gamma means the same at every image size.
    """
    logits_of_an_image = real_logits[0].numel()
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean() / logits_of_an_image


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Return how far logits go beyond the running mean of the other side: squared excess, mean over the logits.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (2021), one-sided as in their
    code.
    """
    return F.relu(real_logits - mean_fake).square().mean() + F.relu(mean_real - fake_logits).square().mean()


class RunningMean(nn.Module):
    """The exponential moving average of a scalar, which starts with the first value.

    It is a buffer, so checkpoints contain it. `blend` returns what the mean would be with a new value and leaves the
    mean unchanged; `commit` takes in all values since the last one. However many micro-batches an update has, its
    mean moves once, and it never takes in a value that is not finite.
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
        """Return the mean as it would be with `value`, and keep `value` for `commit`. The result has no gradient.

        A value that is not finite is ignored: the result is the mean so far.
        """
        value = value.detach()
        self._pending.append(value)
        blended = torch.lerp(value, self.value.to(value.dtype), self.decay)
        return torch.where(torch.isfinite(value), torch.where(self.has_begun, blended, value), self.value)

    def commit(self) -> None:
        """Take in the mean of the values that were blended since the last commit. Without any, do nothing."""
        if self._pending:
            mean = torch.stack(self._pending).mean()
            self._pending.clear()
            self.value.copy_(self.blend(mean))
            self.has_begun |= torch.isfinite(mean)
            self._pending.clear()  # blend has noted the mean, which is no value of the next update

    def discard(self) -> None:
        """Forget the values that were blended since the last commit: their update was not made."""
        self._pending.clear()


Logs = dict[str, Tensor]
Augment = Callable[[Tensor], Tensor]
LECAM_DECAY = 0.999  # Tseng et al.
SMALLEST = 1e-30  # least norm to divide by, in logged values only


def unchanged(images: Tensor) -> Tensor:
    """Return the images as they are: the augmentation of a run that has none."""
    return images


def zero_touching(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return zero, computed from every parameter: DDP expects each of them in every backward."""
    return 0.0 * torch.stack([parameter.flatten()[0] for parameter in parameters]).sum()


class AdversarialLoss(nn.Module):
    """The discriminator's two parts in a step: what it asks of reconstructions, and what it learns from them.

    As a module it holds running means only. The networks belong to the Lightning module, so they are kept in a
    tuple, where torch does not register them.
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
        """The network that tells images from reconstructions."""
        return self._networks[0]

    def gradient(
        self,
        leaf: Tensor,
        reconstruction_gradient: Tensor,
        features: Tensor,
        scale: float,
        augment: Augment = unchanged,
    ) -> tuple[Tensor, Logs]:
        """Return the weighted adversarial gradient at the reconstructions, and values to log.

        `leaf` are the reconstructions (B, C, H, W), detached and requiring a gradient. `reconstruction_gradient` is
        the gradient of the reconstruction terms there, `features` are the input of the decoder's last layer, and
        `scale` is the ramp's factor. The discriminator is held constant.

        The logged `adversarial_share` is the size of that gradient at the last layer, as a share of what its weight
        asks for: 1 if the adaptive weight makes both gradients equal there, less if its bound holds it back.
        """
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = self.generator_loss(functional_call(self.discriminator, constant, (augment(leaf),)))
        (gradient,) = torch.autograd.grad(adversarial, leaf)

        logs: Logs = {}
        balance = torch.ones((), device=leaf.device, dtype=leaf.dtype)
        if self.config.adaptive:
            weight = self._networks[1].weight

            # The gradients are those of the whole batch, so that all processes use the same weight.
            at_last_layer = [last_layer_gradient(features, weight, g) for g in (reconstruction_gradient, gradient)]
            ours, theirs = mean_over_ranks(torch.stack(at_last_layer))
            ratio = adaptive_weight(ours, theirs, self.config.bound_of(leaf[0].numel()))
            balance = self.balance.blend(ratio)
            logs["adversarial_share"] = balance * theirs.norm() / ours.norm().clamp_min(SMALLEST)

        logs |= {"adversarial": adversarial.detach(), "adaptive_weight": balance}
        return scale * self.config.weights.adversarial * balance * gradient, logs

    def loss(self, images: Tensor, reconstructions: Tensor, augment: Augment = unchanged) -> tuple[Tensor, Logs]:
        """Return the discriminator's loss on images and detached reconstructions, and values to log.

        Both are (B, C, H, W) in about [-1, 1]; they go through `augment` first. The penalties R1 and LeCam are added
        if they have a weight.
        """
        config = self.config

        # R1 differentiates the logits in the images, so only then do images need a gradient.
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
        """Return the logits of real and of fake images.

        Both go through one concatenated forward, or each through its own if a norm mixes the images of a batch. The
        autoencoder is judged on reconstructions alone. If the statistics of real images were among theirs, the
        discriminator would learn as one function and judge as another; LDM has two forwards for that reason.
        """
        if self.config.discriminator.mixes_images:
            return self.discriminator(real), self.discriminator(fake)
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        return real_logits, fake_logits

    def zero_loss(self) -> Tensor:
        """Return zero, computed from every parameter: the discriminator's loss before it starts to learn."""
        return zero_touching(self.discriminator.parameters())

    def commit(self) -> None:
        """Move the running means: the update was made."""
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.commit()

    def discard(self) -> None:
        """Leave the running means as they were: the update was not made."""
        for mean in (self.balance, self.real_logit, self.fake_logit):
            mean.discard()


def _summary(real_logits: Tensor, fake_logits: Tensor) -> Logs:
    """Return what shows whether both sides learn: mean logits, their gap, and the discriminator's accuracy.

    The accuracy is the mean of the shares of real logits above 0 and of fake logits below 0.
    """
    real, fake = real_logits.mean(), fake_logits.mean()
    right = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
    return {"real_logits": real, "fake_logits": fake, "logit_gap": real - fake, "discriminator_accuracy": right}
