"""How images become squares in [-1, 1] to be measured: pixels (C, H, W), size -> float32 (C, size, size).

The first is ours, for any channels of 8 or 16 bits; the others are those of the authors that they are named after,
for 8-bit RGB. `vae.evaluation.protocol` says which protocol has which.
"""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vae.data.transforms import center_crop, to_model_range

BILINEAR = InterpolationMode.BILINEAR


def pillow_bicubic(pixels: Tensor, size: int) -> Tensor:
    return to_model_range(center_crop(pixels, size))


def lavinal712(pixels: Tensor, size: int) -> Tensor:
    return _normalised(_pillow_bilinear(pixels, size).float().div(255.0))


def lightningdit(pixels: Tensor, size: int) -> Tensor:
    """Resized as floats, which are not rounded again."""
    resized = TF.resize(pixels.float().div(255.0), [size], BILINEAR, antialias=True)
    return _normalised(TF.center_crop(resized, [size, size]))


def dc_ae(pixels: Tensor, size: int) -> Tensor:
    """The crop of guided-diffusion: halved by box while it can be, then bicubic."""
    image = TF.to_pil_image(pixels)
    if image.size == (size, size):
        return _normalised(pixels.float().div(255.0))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _normalised(_middle(TF.pil_to_tensor(image), size).float().div(255.0))


def seed_voken(pixels: Tensor, size: int) -> Tensor:
    return _signed(_pillow_bilinear(pixels, size))


def ldm(pixels: Tensor, size: int) -> Tensor:
    """albumentations' SmallestMaxSize and CenterCrop: OpenCV's bilinear filter, which does not antialias."""
    height, width = pixels.shape[1:]
    scale = size / min(height, width)
    return _signed(_middle(_opencv_bilinear(pixels, round(height * scale), round(width * scale)), size))


def _pillow_bilinear(pixels: Tensor, size: int) -> Tensor:
    image = TF.resize(TF.to_pil_image(pixels), [size], BILINEAR)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


def _opencv_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """To the bit as OpenCV 4 and 5 resize uint8: with weights of 11 bits, and two truncations between its passes."""
    left, right, a, b = _neighbours(pixels.shape[2], width)
    rows = (pixels[:, :, left] * a + pixels[:, :, right] * b) >> 4
    top, bottom, a, b = _neighbours(pixels.shape[1], height)
    sums = ((rows[:, top] * a[:, None]) >> 16) + ((rows[:, bottom] * b[:, None]) >> 16)
    return ((sums + 2) >> 2).clamp(0, 255).byte()


def _neighbours(given: int, wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each pixel that is wanted: two that are given, and their weights in 1/2048."""
    places = ((torch.arange(wanted).double() + 0.5) * (given / wanted) - 0.5).float()
    first = places.floor()
    share = places - first
    weights = [(2048 * part).round().int() for part in (1.0 - share, share)]
    before, behind = ((first.long() + step).clamp(0, given - 1) for step in (0, 1))
    return before, behind, weights[0], weights[1]


def _middle(pixels: Tensor, size: int) -> Tensor:
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _normalised(values: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], in the order of torchvision's Normalize."""
    return values.sub(0.5).div(0.5)


def _signed(pixels: Tensor) -> Tensor:
    """[0, 255] -> [-1, 1], in float64 and then rounded, as numpy does it."""
    return pixels.double().div(127.5).sub(1.0).to(torch.float32)
