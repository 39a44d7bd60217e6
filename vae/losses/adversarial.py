"""The two sides of the adversarial game, and the weight that balances it against reconstruction."""

import torch.nn.functional as F
from torch import Tensor
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


def ramp(updates: int, start: int, length: int) -> float:
    """0 before `start`, then linearly up to 1 within `length` updates (at once for 0)."""
    if updates < start:
        return 0.0
    return min(1.0, (updates - start + 1) / length) if length else 1.0
