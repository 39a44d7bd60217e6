"""One way to open an image file, and one error when it cannot be."""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vae.errors import InputError, require

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000
BACKGROUND = "white"  # what shows through transparent pixels


class ImageError(InputError):
    """A file is not a usable image: names the file, what is wrong and what to do."""


def open_image(path: str | Path, channels: int = 3) -> Image.Image:
    """The first frame as 8-bit RGB (`channels=3`) or greyscale (`channels=1`).

    Upright as EXIF says, 16-bit scaled to 8 (not clipped), transparency composited on white.
    """
    require(channels in MODES, f"{channels} image channels", "1 (greyscale) or 3 (RGB) where image files are read")
    status = _status(Path(path))
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, "not a regular file")
    if not 0 < status.st_size <= MAX_BYTES:
        raise _refusal(path, f"{status.st_size} bytes, expected 1 to {MAX_BYTES}")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata; sizes are checked right here
            if image.width * image.height > MAX_PIXELS:
                raise _refusal(path, f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}", "shrink it first")
            return _opaque_8bit(ImageOps.exif_transpose(image), path).convert(MODES[channels])
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise _refusal(path, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _refusal(path: str | Path, reason: str, remedy: str = "replace or remove it") -> ImageError:
    return ImageError(f"{path}: {reason}; {remedy}")


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error


def _opaque_8bit(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "F":
        raise _refusal(path, "floating-point pixels have no agreed range", "convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) / 257.0 + 0.5).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba)
    return image
