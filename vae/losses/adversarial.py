"""The two sides of the adversarial game, and the weight that balances it against reconstruction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

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

    def forget(self) -> None:
        """What was blended since the last commit: that update was not made."""
        self._pending.clear()


def ramp(updates: int, start: int, length: int) -> float:
    """0 before `start`, then linearly up to 1 within `length` updates (at once for 0)."""
    if updates < start:
        return 0.0
    return min(1.0, (updates - start + 1) / length) if length else 1.0
