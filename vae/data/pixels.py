"""Pixels in memory: from what decoders give to the channels and bits that are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae.errors import InputError, require

MAXIMUM = {torch.uint8: 255, torch.uint16: 65535}
DTYPES = {8: torch.uint8, 16: torch.uint16}  # bits -> dtype
LUMA = (19595, 38470, 7471)  # Rec. 601 in 1/65536, rounded as in Pillow
ROWS = 256  # computed at a time: as numbers of eight bytes, a large image would not fit into memory
BACKGROUND = 1.0  # white: what shows through transparent pixels, as a share of the maximum

UPRIGHT = {  # EXIF orientation -> how pixels (C, H, W) are turned to stand upright
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.transpose(1, 2).flip(2),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.transpose(1, 2).flip(1),
}


def upright(pixels: Tensor, orientation: Any) -> Tensor:
    """Turn pixels (C, H, W) as EXIF's orientation asks.

    Anything but 2 to 8 asks for nothing.
    """
    return UPRIGHT[orientation](pixels) if orientation in UPRIGHT else pixels


def from_array(image: "Image.Image | np.ndarray") -> Tensor:
    """Return a Pillow image, or an array (H, W) or (H, W, C), as uint8 or uint16 (C, H, W) with its own channels.

    Raises InputError where the numbers have no agreed range.
    """
    is_picture = isinstance(image, Image.Image)
    values = _as_unsigned(np.asarray(_without_palette(image) if is_picture else image))
    if values.ndim == 2:
        values = values[:, :, None]

    # A copy, because Pillow's memory is read-only.
    pixels = torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))
    if is_picture and _is_deep(image) and "transparency" in image.info:
        return with_clear(pixels, image.info["transparency"])
    return pixels


def with_clear(pixels: Tensor, key: Any) -> Tensor:
    """Add alpha to pixels (C, H, W).

    It is 0 where the channels have the values `key`, and the maximum elsewhere.
    """
    values = pixels.numpy()
    opaque = (values != np.asarray(key, values.dtype).reshape(-1, 1, 1)).any(axis=0, keepdims=True)
    return torch.from_numpy(np.concatenate([values, opaque * values.dtype.type(MAXIMUM[pixels.dtype])]))


def as_channels(pixels: Tensor, channels: int) -> Tensor:
    """Return pixels (C, H, W) with `channels` channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Grey becomes RGB and RGB becomes grey. Alpha is composited on white where it is not wanted, and made opaque where it
    is missing. Two channels are grey and alpha. Raises InputError for other numbers, unless they are equal.
    """
    given = len(pixels)
    if given == channels:
        return pixels
    require(given in (1, 2, 3, 4) and channels in (1, 3, 4), f"{given} channels", str(channels))

    if channels == 4:
        colour = as_channels(pixels, 3) if given != 2 else pixels[:1].expand(3, -1, -1)
        alpha = pixels[1:] if given == 2 else torch.full_like(pixels[:1], MAXIMUM[pixels.dtype])
        return torch.cat([colour, alpha])

    if given in (2, 4):
        return as_channels(_by_rows(_composite, pixels, given - 1, pixels.dtype), channels)
    return pixels.expand(3, -1, -1) if given == 1 else _by_rows(_luma, pixels, 1, pixels.dtype)


def as_depth(pixels: Tensor, bits: int) -> Tensor:
    """Return pixels (..., C, H, W) scaled to 8 bits (uint8) or 16 bits (uint16)."""
    if pixels.dtype == DTYPES[bits]:
        return pixels
    return _by_rows(_deepened if bits == 16 else _flattened, pixels, pixels.shape[-3], DTYPES[bits])


def _by_rows(change: Callable[[Tensor], Tensor], pixels: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Apply `change` to some rows at a time. It makes `channels` channels, which are stored as `dtype`."""
    *leading, _, height, width = pixels.shape
    changed = torch.empty(*leading, channels, height, width, dtype=dtype, device=pixels.device)
    for top in range(0, height, ROWS):
        changed[..., top : top + ROWS, :] = change(pixels[..., top : top + ROWS, :]).to(dtype)
    return changed


def _deepened(pixels: Tensor) -> Tensor:
    """Scale 8 bits to 16."""
    return pixels.int() * 257


def _flattened(pixels: Tensor) -> Tensor:
    """Scale 16 bits to 8, rounded."""
    return (pixels.int() + 128) // 257


def _without_palette(image: Image.Image) -> Image.Image:
    """Convert a Pillow image to a mode whose numbers are intensities: L, RGB or RGBA.

    Deeper ones are returned as they are.
    """
    if _is_deep(image):
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _is_deep(image: Image.Image) -> bool:
    """Say whether an image has more than eight bits. Pillow converts none of those modes well."""
    return image.mode == "F" or image.mode.startswith("I")


def _as_unsigned(values: np.ndarray) -> np.ndarray:
    """Return values as uint8 or uint16 in the machine's byte order.

    Raises InputError for numbers without an agreed range: signed or larger integers, and floats outside [0, 1].
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype in (np.uint8, np.uint16):
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255

    if values.dtype.kind != "f":
        raise InputError(f"{values.dtype} pixels, which have no agreed range; expected 8 or 16 bits without a sign")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise InputError("floating-point pixels outside [0, 1], which have no agreed range")
    return np.rint(values * np.float64(65535)).astype(np.uint16)


def _composite(pixels: Tensor) -> Tensor:
    """Composite the colours (C - 1, H, W) on white, by the alpha in the last channel."""
    maximum = MAXIMUM[pixels.dtype]
    share = pixels[-1:].double() / maximum
    return (pixels[:-1] * share + BACKGROUND * maximum * (1.0 - share)).round()


def _luma(pixels: Tensor) -> Tensor:
    """Return the luma (1, H, W) of RGB (3, H, W), as Pillow computes it."""
    red, green, blue = pixels.long()
    return ((red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000) >> 16)[None]
