"""From a photograph to the pixels of a batch, and from those to [-1, 1].

Filters are bicubic and antialiased.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vae.data.pixels import MAXIMUM
from vae.errors import InputError

BICUBIC = Image.Resampling.BICUBIC  # Pillow's antialiased filter, used in validation and in protocol default-v1
EDGE = 3  # pixels of padding before rotation
PICTURE_CHANNELS = (1, 3, 4)  # numbers of channels that Pillow has modes for


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images.

    `scale` bounds the crop's share of the largest possible one. `rotation` is in degrees, `colour` the strength of
    colour jitter.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    rotation: float = 0.0
    colour: float = 0.0


def random_crop(
    pixels: Tensor, size: tuple[int, int], augmentation: Augmentation, draw: torch.Generator | None = None
) -> Tensor:
    """Cut a random window with the aspect of `size` (height, width), and resize it: (C, *size) of the same dtype.

    It is never enlarged where the image has the pixels to give. Without `draw`, torch's global generator draws.
    """
    low, high = augmentation.scale
    fraction = low + (high - low) * _uniform(draw)

    angle = augmentation.rotation * (2.0 * _uniform(draw) - 1.0) if augmentation.rotation else 0.0
    while angle and not _fits(size, angle, pixels):
        angle = angle / 2.0 if abs(angle) > 0.1 else 0.0  # it is better to turn less than to enlarge

    height, width = _spanned(size, angle)
    largest = min(pixels.shape[1] / height, pixels.shape[2] / width)
    unit = min(largest, max(1.0, fraction * largest))  # source pixels to one of the result

    window = _window(pixels, round(height * unit), round(width * unit), draw)
    square = _working(window)

    if angle:
        square = TF.pad(square, [EDGE], padding_mode="edge")  # sizes are rounded, and filters reach over the border
        square = TF.rotate(square, angle, InterpolationMode.BILINEAR)
        square = TF.center_crop(square, [max(1, round(side * unit)) for side in size])

    if square.shape[1:] != size:
        square = TF.resize(square, list(size), InterpolationMode.BICUBIC, antialias=True)

    if augmentation.flip and _uniform(draw) < 0.5:
        square = square.flip(2)
    if augmentation.colour:
        square = _jittered(square, augmentation.colour, _uniform(draw))

    return _finished(square, pixels.dtype)


def center_crop(pixels: Tensor, size: int) -> Tensor:
    """Resize the short side to `size` by Pillow, and cut the central square: (C, size, size) of the same dtype."""
    height, width = pixels.shape[1:]
    short = min(height, width)
    target = [int(size * side / short) for side in (height, width)]
    return TF.center_crop(_resized(pixels, target[0], target[1]), [size, size]).contiguous()


def crop_to_multiple(pixels: Tensor, factor: int, path: str | Path) -> Tensor:
    """Cut the centre of the whole image, with sides that are multiples of `factor`: (C, H, W).

    Raises InputError, which names `path`, where a side is below `factor`.
    """
    height, width = (side // factor * factor for side in pixels.shape[1:])
    if not height or not width:
        raise InputError(f"{path}: {pixels.shape[2]}x{pixels.shape[1]} pixels, expected {factor} or more each way")
    return TF.center_crop(pixels, [height, width])


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 [0, 255] or uint16 [0, 65535] to float32 [-1, 1]. Floats are returned as they are."""
    if images.is_floating_point():
        return images
    return images.float().div_(MAXIMUM[images.dtype] / 2).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Map [-1, 1] to uint8 [0, 255]: clamped, then rounded."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _uniform(draw: torch.Generator | None) -> float:
    """Draw one number from [0, 1)."""
    return torch.rand((), generator=draw).item()


def _spanned(size: tuple[int, int], angle: float) -> tuple[float, float]:
    """Return (height, width) of the upright box around `size` turned by `angle` degrees.

    Within such a box, no corner of the turned crop is without pixels.
    """
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return size[0] * cosine + size[1] * sine, size[0] * sine + size[1] * cosine


def _fits(size: tuple[int, int], angle: float, pixels: Tensor) -> bool:
    """Say whether a crop of `size`, turned by `angle` degrees, lies within the image."""
    height, width = _spanned(size, angle)
    return height <= pixels.shape[1] and width <= pixels.shape[2]


def _window(pixels: Tensor, height: int, width: int, draw: torch.Generator | None) -> Tensor:
    """Cut a window of `height` x `width` at random, no larger than the image."""
    height, width = max(1, min(height, pixels.shape[1])), max(1, min(width, pixels.shape[2]))
    left = int(torch.randint(0, pixels.shape[2] - width + 1, (), generator=draw).item())
    top = int(torch.randint(0, pixels.shape[1] - height + 1, (), generator=draw).item())
    return pixels[:, top : top + height, left : left + width]


def _working(pixels: Tensor) -> Tensor:
    """Return uint8 as it is, and uint16 as floats in [0, 1], for which torch has the operations."""
    return pixels if pixels.dtype == torch.uint8 else pixels.float() / MAXIMUM[pixels.dtype]


def _finished(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels in `dtype`, from what `_working` made."""
    if dtype == torch.uint8:
        return pixels
    return (pixels.clamp(0.0, 1.0) * MAXIMUM[dtype]).round().to(dtype)


def _jittered(pixels: Tensor, strength: float, drawn: float) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, by a seed from `drawn` in [0, 1).

    torchvision draws from the global generator, whose state is restored afterwards.
    """
    jitter = ColorJitter(brightness=strength, contrast=strength, saturation=strength, hue=min(0.5, strength / 4))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(drawn * 2**32))  # the CPU's generator alone
        return jitter(pixels)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize pixels (C, H, W) by Pillow, plane by plane where it has no mode for them."""
    if pixels.shape[1:] == (height, width):
        return pixels
    if pixels.dtype == torch.uint8 and len(pixels) in PICTURE_CHANNELS:
        return TF.pil_to_tensor(TF.to_pil_image(pixels).resize((width, height), BICUBIC))

    planes = [Image.fromarray(plane.astype(np.float32)).resize((width, height), BICUBIC) for plane in pixels.numpy()]
    values = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    return values.clamp(0, MAXIMUM[pixels.dtype]).round().to(pixels.dtype)
