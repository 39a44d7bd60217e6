"""The raw terms of reconstruction and of the posterior: pixel losses, the KL divergence, the distance to a teacher.

Pixel losses are means over every element of (B, C, H, W). Images are in [-1, 1]; reconstructions are not clamped.
"""

from torch import Tensor

from vae.models.posterior import DiagonalGaussian

CHARBONNIER_EPS = 1e-3


def l1_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean absolute difference per element."""
    return (images - reconstructions).abs().mean()


def l2_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean squared difference per element."""
    return (images - reconstructions).square().mean()


def charbonnier_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2) - eps: L1 with a smooth minimum (Charbonnier et al., 1994)."""
    return ((images - reconstructions).square() + CHARBONNIER_EPS**2).sqrt().mean() - CHARBONNIER_EPS


PIXEL_LOSSES = {"l1": l1_loss, "l2": l2_loss, "charbonnier": charbonnier_loss}


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """Return KL(q || N(0, I)) in nats per *image* element (of C * H * W), mean over the batch.

    It is divided like the pixel term, so that a weight of 1e-6 means what it means in LDM, which sums both over the
    image.
    """
    return posterior.kl().mean() / images[0].numel()


def latent_distance(posterior: DiagonalGaussian, target: DiagonalGaussian) -> Tensor:
    """Return the squared 2-Wasserstein distance of the two posteriors, mean over all latent elements.

    For Gaussians with diagonal covariance it is |m1 - m2|^2 + |s1 - s2|^2 (Dowson and Landau, "The Frechet distance
    between multivariate normal distributions", 1982). Unlike the KL divergence it has no singularity at a target of
    zero width.
    """
    return ((posterior.mean - target.mean).square() + (posterior.std - target.std).square()).mean()
