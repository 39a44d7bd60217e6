"""What is accepted as an image, before anything of it is decoded, and the one error for what is not.

PNG files of 16-bit colour, of which Pillow keeps eight bits: read twice, for the high bytes and the low ones.

torchvision would give all bits at once, but its decoder of PNG crashes on damaged files.


One way to open an image, wherever it lies, and one error when it cannot be."""

import errno
import io
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vae.data.pixels import MAXIMUM, as_channels, as_depth, from_array, upright, with_clear
from vae.data.tiff import LONGEST_SIGNATURE, ORIENTATION, kind_of, npy_shape, read_npy, read_tiff, tiff_page
from vae.errors import InputError, require

MAX_PIXELS = 100_000_000
MAX_CHANNELS = 4  # of an image of so many pixels; smaller ones may have more
MAX_BYTES = 200_000_000
MIN_SIDE, MAX_ASPECT = 8, 20
OF_THE_FILE = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class ImageError(InputError):
    """Something is not a usable image: names it, what is wrong and what to do."""


def refusal(label: str, reason: str, remedy: str = "replace or remove it") -> ImageError:
    return ImageError(f"{printable(label)}: {reason}; {remedy}")


def printable(name: str) -> str:
    """File names may hold what moves the cursor, and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


@contextmanager
def reraise_machine_errors(name: str) -> Iterator[None]:
    """An ImageError where the image is at fault, which will be so again; any other error where the machine is.

    A file system that went away, or memory that ran out, must not cost images that are whole.
    """
    try:
        yield
    except (ImageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, ImageError) else error
        failed = isinstance(cause, OSError) and cause.errno not in OF_THE_FILE
        if failed or isinstance(cause, MemoryError) or not isinstance(error, ImageError):
            reason = getattr(cause, "strerror", None) or type(cause).__name__
            raise InputError(f"{printable(name)}: {reason}; see to the machine and give the command again") from error
        raise


def check_status(path: Path, label: str) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise refusal(label, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise refusal(label, "not a regular file")
    check_length(status.st_size, label)


def check_length(length: int, label: str) -> None:
    if not 0 < length <= MAX_BYTES:
        raise refusal(label, f"{length} bytes, expected 1 to {MAX_BYTES}")


def check_size(width: int, height: int, label: str, channels: int = 1) -> None:
    """Before anything is decoded: a small file may ask for any amount of memory."""
    size = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise refusal(label, f"{size}, more than {MAX_PIXELS}", "shrink it first")
    if width * height * channels > MAX_PIXELS * MAX_CHANNELS:
        raise refusal(label, f"{size} of {channels} channels, more than {MAX_PIXELS * MAX_CHANNELS} values")
    if min(width, height) < MIN_SIDE:
        raise refusal(label, f"{size}, expected {MIN_SIDE} or more each way")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise refusal(label, f"{size}, longer than {MAX_ASPECT} times its shorter side", "crop it first")


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


EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".npy"})
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow's names; others are not even tried
TURNING = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what in a PNG can say how it is to be turned

Encoded = Path | bytes | Tensor  # a file, what is in one, or pixels (C, H, W) as uint8 or uint16


def open_image(file: str | Encoded, channels: int = 3, bits: int = 8, name: str | None = None) -> Tensor:
    """The first frame, upright as EXIF says: uint8 (C, H, W), or uint16 where `bits` is 16. Errors call it `name`.

    Depths are scaled, never clipped. One channel is greyscale (Pillow's luma), three are RGB with transparency
    composited on white, four are RGBA; other numbers come from .npy arrays (H, W, C) and TIFF files of as many.
    Floating-point images are taken where they lie in [0, 1].
    """
    require(bits in (8, 16), f"{bits} bits", "8 or 16")
    label = name or ("an image" if isinstance(file, bytes | Tensor) else str(file))
    try:
        with _quiet:
            return as_depth(as_channels(_pixels_of(file, channels, label), channels), bits)
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise _undecodable(label, error) from error


def image_size(file: str | Encoded, name: str | None = None) -> tuple[int, int]:
    """(height, width), upright, from the header alone."""
    if isinstance(file, Tensor):
        return file.shape[-2], file.shape[-1]
    label = name or ("an image" if isinstance(file, bytes) else str(file))
    try:
        with _quiet:
            if isinstance(file, bytes):
                return _upright_size(io.BytesIO(file), label)
            check_status(Path(file), label)
            with Path(file).open("rb") as stream:
                return _upright_size(stream, label)
    except ImageError:
        raise
    except Exception as error:
        raise _undecodable(label, error) from error


def _undecodable(label: str, error: Exception) -> ImageError:
    if isinstance(error, InputError):
        return refusal(label, str(error), "convert or remove it")
    if isinstance(error, UnidentifiedImageError):
        return refusal(label, f"no image in a format that is read ({', '.join(FORMATS)}, .npy)")
    return refusal(label, f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _pixels_of(file: str | Encoded, channels: int, label: str) -> Tensor:
    if isinstance(file, bytes):
        check_length(len(file), label)
        return _decoded(file, channels, label)
    if isinstance(file, str | Path):
        check_status(Path(file), label)
        return _decoded(Path(file).read_bytes(), channels, label)
    if not isinstance(file, Tensor):
        raise refusal(label, f"read as {type(file).__name__}", "give a path, the bytes of a file or a tensor (C, H, W)")
    is_last = file.ndim == 3 and file.shape[2] <= MAX_CHANNELS < file.shape[0]
    if file.ndim != 3 or file.dtype not in MAXIMUM or is_last:
        raise refusal(label, f"a {file.dtype} tensor of shape {tuple(file.shape)}", "give uint8 or uint16 (C, H, W)")
    check_size(file.shape[2], file.shape[1], label)
    return file


def _decoded(data: bytes, channels: int, label: str) -> Tensor:
    """uint8 or uint16 (C, H, W) with the channels that the file has, palettes and inks apart."""
    kind = kind_of(data)
    if kind == "npy":
        height, width, *_ = npy_shape(io.BytesIO(data))
        check_size(width, height, label)
        return from_array(read_npy(data))
    if kind == "tiff":
        return _decoded_tiff(data, channels, label)
    with _opened(io.BytesIO(data)) as image:
        check_size(image.width, image.height, label)
        if _is_plain(image):
            try:
                return _decoded_by_torch(image, data)
            except RuntimeError:  # stricter than Pillow about some files, which has the last word
                pass
        return _decoded_by_pillow(image, data)


def _decoded_tiff(data: bytes, channels: int, label: str) -> Tensor:
    page = tiff_page(io.BytesIO(data))
    check_size(page.width, page.height, label, page.channels)
    if not page.is_beyond_pillow(channels):
        try:
            with _opened(io.BytesIO(data)) as image:
                return _decoded_by_pillow(image, data)
        except UnidentifiedImageError:  # of channels that it has no mode for
            pass
    return upright(from_array(read_tiff(data, page)), page.orientation)


def _decoded_by_torch(image: Image.Image, data: bytes) -> Tensor:
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    assert isinstance(pixels, Tensor)  # of one file, not of a list of them
    return upright(pixels, _orientation(image, data))


def _decoded_by_pillow(image: Image.Image, data: bytes) -> Tensor:
    pixels = read_deep(data) if is_deep(image) else from_array(image)
    return upright(pixels, _orientation(image, data))


def _orientation(image: Image.Image, data: bytes) -> Any:
    if image.format == "PNG" and not any(mark in data for mark in TURNING):
        return 1  # Pillow would decode it to look behind its pixels
    return image.getexif().get(ORIENTATION, 1)


def _opened(stream: IO[bytes]) -> Image.Image:
    return Image.open(stream, formats=_formats())


def _upright_size(stream: IO[bytes], label: str) -> tuple[int, int]:
    kind = kind_of(stream.read(LONGEST_SIGNATURE))
    stream.seek(0)
    if kind == "npy":
        height, width, *_ = npy_shape(stream)
        orientation = 1
    elif kind == "tiff":
        width, height, *_, orientation, _ = tiff_page(stream)
    else:
        with _opened(stream) as image:
            width, height = image.size
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # a PNG's own would decode it
    check_size(width, height, label)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _is_plain(image: Image.Image) -> bool:
    """torchvision decodes it to Pillow's pixels, and faster. (Not PNG: on damaged ones its decoder crashes.)"""
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Quiet:
    """No warnings within: Pillow remarks on metadata and large sizes, and those that matter are checked by us.

    Filters are the process's and images are read by many threads: the first to come in changes them, the last to leave
    puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()
