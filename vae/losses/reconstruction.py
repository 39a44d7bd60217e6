"""How far reconstructions are from images, pixel by pixel: means over every element of (B, C, H, W).

What the posterior costs, and how far it is from a teacher's."""

from torch import Tensor

from vae.models.posterior import DiagonalGaussian

CHARBONNIER_EPS = 1e-3


def l1_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    return (images - reconstructions).abs().mean()


def l2_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    return (images - reconstructions).square().mean()


def charbonnier_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """sqrt(difference^2 + eps^2) - eps: L1 with a smooth bottom (Charbonnier et al., 1994)."""
    return ((images - reconstructions).square() + CHARBONNIER_EPS**2).sqrt().mean() - CHARBONNIER_EPS


PIXEL_LOSSES = {"l1": l1_loss, "l2": l2_loss, "charbonnier": charbonnier_loss}


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL(q || N(0, I)) in nats per image *element* (C * H * W), mean over the batch.

    Divided like the pixel term, so that a weight of 1e-6 means what it means in LDM, which sums both over the image.
    """
    return posterior.kl().mean() / images[0].numel()


def latent_distance(posterior: DiagonalGaussian, target: DiagonalGaussian) -> Tensor:
    """Squared 2-Wasserstein distance of the two, mean over all latent elements.

    For Gaussians with diagonal covariance |m1 - m2|^2 + |s1 - s2|^2 (Dowson and Landau, "The Frechet distance between
    multivariate normal distributions", 1982). A target without width is no singularity, as it is for the KL divergence.
    """
    return ((posterior.mean - target.mean).square() + (posterior.std - target.std).square()).mean()
