"""Metrics of pixels: PSNR, mean absolute error, and changes of appearance that PSNR does not show.

Appearance is colour, contrast, saturation and sharpness, which people see at once. It is measured in CIELAB (CIE 15,
D65) of sRGB images (IEC 61966-2-1). L* is lightness from 0 to 100, the length of (a*, b*) is chroma, and a distance of
1 is about the least that is seen. Ratios are the reconstruction's value over the image's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.models.lpips import as_rgb

VISIBLE = 1.0  # of L* or chroma
LEVEL = 100.0 / 255.0  # a step of 8 bits, in L*
XYZ_OF_RGB = (
    (0.412453, 0.357580, 0.180423),  # ITU-R BT.709 primaries
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)


def psnr(images: Tensor, reconstructions: Tensor, peak: float = 255.0) -> Tensor:
    """Return the PSNR in decibels (B,), float64, of images and reconstructions (B, C, H, W).

    It is infinite where the two are identical. `peak` is the distance from black to white: 255 for uint8, 2 for
    [-1, 1].
    """
    squared = (images.double() - reconstructions.double()).square()
    return 10.0 * torch.log10(peak**2 / squared.flatten(1).mean(dim=1))


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean absolute error (B,), float64, of images and reconstructions, uint8 (B, C, H, W).

    0 is no error, 1 is black for white.
    """
    return (images.double() - reconstructions.double()).abs().flatten(1).mean(dim=1) / 255.0


def appearance(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """Compare images and reconstructions, uint8 (B, C, H, W), grey, RGB or RGBA: {name: (B,) float64}.

    H and W are at least 5. colour_shift is the CIE 1976 distance of the two mean colours. The others are ratios:
    contrast of the standard deviations of L*, saturation of the mean chromas, sharpness of the mean gradients of L*
    (the "average gradient" of image fusion), high_frequency of the mean squares of `details`.

    A ratio is NaN, not applicable, where the image has nothing that could be kept: less contrast or chroma than is
    visible, or no more of the others than rounding to 8 bits makes by itself.
    """
    before, after = lab(images), lab(reconstructions)
    contrasts, saturations, gradients, energies = zip(*map(_amounts, (before, after)), strict=True)

    # Rounding to 8 bits makes gradients of half a level, and an energy of a twelfth of a level squared, by itself.
    return {
        "colour_shift": (after - before).mean(dim=(2, 3)).square().sum(dim=1).sqrt(),
        "contrast": _ratio(*contrasts, least=VISIBLE),
        "saturation": _ratio(*saturations, least=VISIBLE),
        "sharpness": _ratio(*gradients, least=LEVEL / 2),
        "high_frequency": _ratio(*energies, least=LEVEL**2 / 12),
    }


def lab(images: Tensor) -> Tensor:
    """Return L*, a*, b* (B, 3, H, W), float64, of images uint8 (B, C, H, W), whose channels are those of `as_rgb`."""
    rgb = (as_rgb(images.double() / 127.5 - 1.0) + 1.0) / 2.0

    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    matrix = linear.new_tensor(XYZ_OF_RGB)
    relative = torch.einsum("ij,bjhw->bihw", matrix / matrix.sum(dim=1, keepdim=True), linear)  # white is (1, 1, 1)

    x, y, z = torch.where(relative > (6 / 29) ** 3, relative ** (1 / 3), relative * (29 / 6) ** 2 / 3 + 4 / 29).unbind(
        1
    )
    return torch.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], dim=1)


def details(lightness: Tensor) -> Tensor:
    """Return lightness (B, H, W) less its blur, (B, H - 4, W - 4).

    The blur is 1-4-6-4-1, the kernel of Burt and Adelson (1983). What remains is all of waves of two pixels, and half
    the amplitude of waves of five and a half.
    """
    kernel = lightness.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    blurred = F.conv2d(F.conv2d(lightness[:, None], kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return lightness[:, 2:-2, 2:-2] - blurred[:, 0]


def _amounts(colours: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return contrast, saturation, gradient and energy of details, (B,) each, of L*, a*, b* (B, 3, H, W)."""
    lightness = colours[:, 0]
    chroma = colours[:, 1:].square().sum(dim=1).sqrt()

    down = lightness[:, 1:, :-1] - lightness[:, :-1, :-1]
    right = lightness[:, :-1, 1:] - lightness[:, :-1, :-1]
    gradient = (down.square() + right.square()).sqrt()

    return (
        lightness.std(dim=(1, 2), correction=0),
        chroma.mean(dim=(1, 2)),
        gradient.mean(dim=(1, 2)),
        details(lightness).square().mean(dim=(1, 2)),
    )


def _ratio(before: Tensor, after: Tensor, *, least: float) -> Tensor:
    """Return after / before, (B,), and NaN where `before` is below `least`."""
    return torch.where(before < least, torch.nan, after / before)
