"""What the posterior costs."""

from torch import Tensor

from vae.models.posterior import DiagonalGaussian


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL(q || N(0, I)) in nats per image *element* (C * H * W), mean over the batch.

    Divided like the pixel term, so that a weight of 1e-6 means what it means in LDM, which sums both over the image.
    """
    return posterior.kl().mean() / images[0].numel()
