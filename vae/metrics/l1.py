"""Mean absolute error."""

from torch import Tensor


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> error (B,), float64, one per image: 0 is none, 1 is black for white."""
    return (images.double() - reconstructions.double()).abs().flatten(1).mean(dim=1) / 255.0
