"""PNG files of 16-bit colour, of which Pillow keeps eight bits: read twice, for the high bytes and the low ones.

torchvision would give all bits at once, but its decoder of PNG crashes on damaged files.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from vae.data.pixels import from_array, with_clear


def is_deep(image: Image.Image) -> bool:
    """RGB or RGBA of 16 bits, not yet loaded."""
    return (
        isinstance(image, PngImagePlugin.PngImageFile) and bool(image.tile) and image.tile[0].args == _mode(image, "B")
    )


def read_deep(data: bytes) -> Tensor:
    """uint16 (C, H, W)"""
    high, clear = _half(data, "B")
    low, _ = _half(data, "L")
    pixels = from_array(high << 8 | low)
    return pixels if clear is None else with_clear(pixels, clear)


def _half(data: bytes, half: str) -> tuple[np.ndarray, Any]:
    """One byte of each sample, and the colour that means transparent if there is one."""
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args=_mode(image, half)) for tile in image.tile]
        return np.asarray(image).astype(np.uint16), image.info.get("transparency")


def _mode(image: Image.Image, half: str) -> str:
    """Pillow's name for big-endian samples (B), whose first byte it keeps, or little-endian ones (L): the second."""
    return f"{image.mode};16{half}"
