"""One way to open an image, wherever it lies, and one error for what is no usable image.

Before anything is decoded, the header says whether the image is accepted: its file, its length, its size. PNG files of
16-bit colour, of which Pillow keeps eight bits, are read twice, for the high bytes and for the low ones. torchvision
would give all bits at once, but its decoder of PNG crashes on damaged files.
"""

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
from vae.errors import InputError, printable, require

MAX_PIXELS = 100_000_000
MAX_CHANNELS = 4  # of an image of MAX_PIXELS; smaller images may have more
MAX_BYTES = 200_000_000
MIN_SIDE, MAX_ASPECT = 8, 20
OF_THE_FILE = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class ImageError(InputError):
    """Something is not a usable image. The message names it, what is wrong, and the remedy."""


def refusal(label: str, reason: str, remedy: str = "replace or remove it") -> ImageError:
    """Make the error for an image that cannot be used, from what it is called, the reason and the remedy."""
    return ImageError(f"{printable(label)}: {reason}; {remedy}")


@contextmanager
def reraise_machine_errors(name: str) -> Iterator[None]:
    """Raise ImageError where the image is at fault, and InputError where the machine is, within the block.

    An image at fault will fail again. A file system that went away, or memory that ran out, must not cost images that
    are whole.
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
    """Raise ImageError where `path` is not a regular file that can be reached, or is too long."""
    try:
        status = path.stat()
    except OSError as error:
        raise refusal(label, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise refusal(label, "not a regular file")
    check_length(status.st_size, label)


def check_length(length: int, label: str) -> None:
    """Raise ImageError where a file is empty, or longer than any image should be."""
    if not 0 < length <= MAX_BYTES:
        raise refusal(label, f"{length} bytes, expected 1 to {MAX_BYTES}")


def check_size(width: int, height: int, label: str, channels: int = 1) -> None:
    """Raise ImageError where an image is too small, too large, or too long for its width.

    This comes before anything is decoded, because a small file may ask for any amount of memory.
    """
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
    """Say whether a PNG that is not yet loaded has RGB or RGBA of 16 bits."""
    return (
        isinstance(image, PngImagePlugin.PngImageFile) and bool(image.tile) and image.tile[0].args == _mode(image, "B")
    )


def read_deep(data: bytes) -> Tensor:
    """Decode a PNG of 16 bits: uint16 (C, H, W)."""
    high, clear = _half(data, "B")
    low, _ = _half(data, "L")
    pixels = from_array(high << 8 | low)
    return pixels if clear is None else with_clear(pixels, clear)


def _half(data: bytes, half: str) -> tuple[np.ndarray, Any]:
    """Return one byte of each sample, and the colour that means transparent, if there is one."""
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args=_mode(image, half)) for tile in image.tile]
        return np.asarray(image).astype(np.uint16), image.info.get("transparency")


def _mode(image: Image.Image, half: str) -> str:
    """Return Pillow's name for samples of 16 bits, whose high byte it keeps.

    Of big-endian samples (B), as a PNG has them, that is the first byte. Of samples that are declared little-endian (L)
    it is the second, which is a PNG's low byte.
    """
    return f"{image.mode};16{half}"


EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".npy"})
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow's names; other formats are not tried
TURNING = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # marks of what in a PNG can hold an orientation

Encoded = Path | bytes | Tensor  # a file, what is in one, or pixels (C, H, W) as uint8 or uint16


def open_image(file: str | Encoded, channels: int = 3, bits: int = 8, name: str | None = None) -> Tensor:
    """Decode the first frame, upright as EXIF says: uint8 (C, H, W), or uint16 for 16 `bits`.

    Depths are scaled, never clipped. One channel is greyscale (Pillow's luma), three are RGB with transparency
    composited on white, four are RGBA. Other numbers of channels come from .npy arrays (H, W, C) and TIFF files that
    have as many. Floating-point images are accepted where they lie in [0, 1]. Raises ImageError, which calls the image
    `name`.
    """
    require(bits in (8, 16), f"{bits} bits", "8 or 16")

    label = name or ("an image" if isinstance(file, bytes | Tensor) else str(file))

    try:
        with _quiet:
            return as_depth(as_channels(_pixels_of(file, channels, label), channels), bits)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise _undecodable(label, error) from error


def image_size(file: str | Encoded, name: str | None = None) -> tuple[int, int]:
    """Return (height, width) of the upright image, from the header alone.

    Raises ImageError, which calls the image `name`.
    """
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
    """Make the ImageError for whatever a decoder raised."""
    if isinstance(error, InputError):
        return refusal(label, str(error), "convert or remove it")
    if isinstance(error, UnidentifiedImageError):
        return refusal(label, f"no image in a format that is read ({', '.join(FORMATS)}, .npy)")
    return refusal(label, f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _pixels_of(file: str | Encoded, channels: int, label: str) -> Tensor:
    """Return the pixels (C, H, W) of a file, of bytes, or of a tensor, once its length or size is accepted."""
    if isinstance(file, bytes):
        check_length(len(file), label)
        return _decoded(file, channels, label)

    if isinstance(file, str | Path):
        check_status(Path(file), label)
        return _decoded(Path(file).read_bytes(), channels, label)

    if not isinstance(file, Tensor):
        raise refusal(label, f"read as {type(file).__name__}", "give a path, the bytes of a file or a tensor (C, H, W)")

    # A tensor (H, W, C) is a common mistake: few channels in the last place, many in the first.
    is_last = file.ndim == 3 and file.shape[2] <= MAX_CHANNELS < file.shape[0]
    if file.ndim != 3 or file.dtype not in MAXIMUM or is_last:
        raise refusal(label, f"a {file.dtype} tensor of shape {tuple(file.shape)}", "give uint8 or uint16 (C, H, W)")

    check_size(file.shape[2], file.shape[1], label)
    return file


def _decoded(data: bytes, channels: int, label: str) -> Tensor:
    """Decode a file: uint8 or uint16 (C, H, W) with the channels that it has; palettes and inks are converted."""
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
            except RuntimeError:  # torchvision is stricter than Pillow about some files; Pillow has the last word
                pass
        return _decoded_by_pillow(image, data)


def _decoded_tiff(data: bytes, channels: int, label: str) -> Tensor:
    """Decode a TIFF file, by Pillow where it loses nothing."""
    page = tiff_page(io.BytesIO(data))
    check_size(page.width, page.height, label, page.channels)

    if not page.is_beyond_pillow(channels):
        try:
            with _opened(io.BytesIO(data)) as image:
                return _decoded_by_pillow(image, data)
        except UnidentifiedImageError:  # Pillow has no mode for such channels
            pass

    return upright(from_array(read_tiff(data, page)), page.orientation)


def _decoded_by_torch(image: Image.Image, data: bytes) -> Tensor:
    """Decode a JPEG by torchvision, upright."""
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    assert isinstance(pixels, Tensor)  # one tensor, because one file was given and no list
    return upright(pixels, _orientation(image, data))


def _decoded_by_pillow(image: Image.Image, data: bytes) -> Tensor:
    """Decode an image that Pillow has opened, upright."""
    pixels = read_deep(data) if is_deep(image) else from_array(image)
    return upright(pixels, _orientation(image, data))


def _orientation(image: Image.Image, data: bytes) -> Any:
    """Return EXIF's orientation of an opened image."""
    if image.format == "PNG" and not any(mark in data for mark in TURNING):
        return 1  # otherwise Pillow would decode it, to look for EXIF after the pixels
    return image.getexif().get(ORIENTATION, 1)


def _opened(stream: IO[bytes]) -> Image.Image:
    """Open an image by Pillow, without decoding it."""
    return Image.open(stream, formats=_formats())


def _upright_size(stream: IO[bytes], label: str) -> tuple[int, int]:
    """Read (height, width) of the upright image from its header."""
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
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # the method of PNG would decode it

    check_size(width, height, label)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _is_plain(image: Image.Image) -> bool:
    """Say whether torchvision decodes the image to the same pixels as Pillow, and faster.

    PNG is never plain: torchvision's decoder crashes on damaged ones.
    """
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return the names of the formats that this installation of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Quiet:
    """A context without warnings.

    Pillow remarks on metadata and large sizes, and what matters of that is checked here. Warning filters belong to the
    process, and images are read by many threads. So the first thread to enter changes the filters, and the last to
    leave restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

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
