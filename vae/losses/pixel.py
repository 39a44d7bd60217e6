"""How far reconstructions are from images, pixel by pixel: means over every element of (B, C, H, W)."""

from torch import Tensor

CHARBONNIER_EPS = 1e-3


def l1_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    return (images - reconstructions).abs().mean()


def l2_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    return (images - reconstructions).square().mean()


def charbonnier_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """sqrt(difference^2 + eps^2) - eps: L1 with a smooth bottom (Charbonnier et al., 1994)."""
    return ((images - reconstructions).square() + CHARBONNIER_EPS**2).sqrt().mean() - CHARBONNIER_EPS


PIXEL_LOSSES = {"l1": l1_loss, "l2": l2_loss, "charbonnier": charbonnier_loss}
