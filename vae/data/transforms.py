"""From a photograph to a square of pixels, and from uint8 to [-1, 1]."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vae.errors import InputError

BICUBIC = Image.Resampling.BICUBIC  # Pillow's antialiased filter: of training, of validation and of protocol default-v1


def random_crop(image: Image.Image, size: int, scale: tuple[float, float], *, flip: bool) -> Tensor:
    """A random square whose side is `scale` times the short side, resized to `size`; uint8 (C, size, size).

    Never enlarged where the image has `size` pixels to give. Draws from torch's global generator.
    """
    short = min(image.size)
    fraction = scale[0] + (scale[1] - scale[0]) * torch.rand(()).item()
    side = min(short, max(size, round(fraction * short)))
    left, top = (int(torch.randint(0, extent - side + 1, ()).item()) for extent in image.size)
    box = (left, top, left + side, top + side)
    square = image.crop(box) if side == size else image.resize((size, size), BICUBIC, box=box)
    if flip and torch.rand(()).item() < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return TF.pil_to_tensor(square)


def center_crop(image: Image.Image, size: int) -> Tensor:
    """The short side resized to `size`, then the central square; uint8 (C, size, size)."""
    square = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    return TF.pil_to_tensor(square(image))


def crop_to_multiple(image: Image.Image, factor: int, path: str | Path) -> Tensor:
    """The centre of the whole image, its sides multiples of `factor`; uint8 (C, H, W). Errors name `path`."""
    height, width = (side // factor * factor for side in (image.height, image.width))
    if not height or not width:
        raise InputError(f"{path}: {image.width}x{image.height} pixels, expected {factor} or more each way")
    return TF.center_crop(TF.pil_to_tensor(image), [height, width])


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255]: clamped, then rounded."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
