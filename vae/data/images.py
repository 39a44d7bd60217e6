"""One way to open an image, wherever it lies, and one error when it cannot be."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from vae.data.arrays import LONGEST_SIGNATURE, kind_of, npy_shape, read_npy, read_tiff, tiff_shape
from vae.data.limits import ImageError, check_length, check_size, check_status, refusal
from vae.data.pixels import as_channels, as_depth, from_array, upright
from vae.errors import require

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".npy"})
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow's names; others are not even tried
ORIENTATION = 0x0112  # EXIF's tag, 1 to 8
BITS_PER_SAMPLE = 258  # TIFF's tag

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
        with _quiet():
            pixels = _checked(file, label) if isinstance(file, Tensor) else _decoded(_bytes_of(file, label), label)
            return as_depth(as_channels(pixels, channels), bits)
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise refusal(label, f"cannot be decoded ({type(error).__name__}: {reason})") from error


def image_size(file: str | Encoded, name: str | None = None) -> tuple[int, int]:
    """(height, width), upright, from the header alone."""
    if isinstance(file, Tensor):
        return file.shape[-2], file.shape[-1]
    label = name or ("an image" if isinstance(file, bytes) else str(file))
    try:
        with _quiet():
            if isinstance(file, bytes):
                return _upright_size(io.BytesIO(file), label)
            check_status(Path(file), label)
            with Path(file).open("rb") as stream:
                return _upright_size(stream, label)
    except ImageError:
        raise
    except Exception as error:
        raise refusal(label, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _bytes_of(file: str | Path | bytes, label: str) -> bytes:
    if isinstance(file, bytes):
        check_length(len(file), label)
        return file
    check_status(Path(file), label)
    return Path(file).read_bytes()


def _checked(pixels: Tensor, label: str) -> Tensor:
    if pixels.ndim != 3 or pixels.dtype not in (torch.uint8, torch.uint16):
        raise refusal(
            label, f"a {pixels.dtype} tensor of shape {tuple(pixels.shape)}", "give uint8 or uint16 (C, H, W)"
        )
    check_size(pixels.shape[2], pixels.shape[1], label)
    return pixels


def _decoded(data: bytes, label: str) -> Tensor:
    """uint8 or uint16 (C, H, W) with the channels that the file has, palettes and inks apart."""
    if kind_of(data) == "npy":
        height, width, *_ = npy_shape(data)
        check_size(width, height, label)
        return from_array(read_npy(data))
    try:
        image = _opened(io.BytesIO(data))
    except UnidentifiedImageError:
        if kind_of(data) != "tiff":
            raise
        height, width = tiff_shape(io.BytesIO(data))
        check_size(width, height, label)
        return from_array(read_tiff(data))
    with image:
        check_size(image.width, image.height, label)
        return _decoded_by_the_best(image, data)


def _decoded_by_the_best(image: Image.Image, data: bytes) -> Tensor:
    if _is_plain(image, data):
        try:
            pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
            return upright(pixels, image.getexif().get(ORIENTATION, 1) if image.format != "PNG" else 1)
        except RuntimeError:  # stricter than Pillow about some files, which has the last word
            pass
    if image.format == "TIFF" and _is_deep_colour(image):
        return upright(from_array(read_tiff(data)), image.getexif().get(ORIENTATION, 1))
    image.load()
    return upright(from_array(image), image.getexif().get(ORIENTATION, 1))


def _opened(stream: "io.IOBase") -> Image.Image:
    return Image.open(stream, formats=_formats())  # pyright: ignore[reportArgumentType]


def _upright_size(stream: "io.IOBase", label: str) -> tuple[int, int]:
    kind = kind_of(stream.read(LONGEST_SIGNATURE))
    stream.seek(0)
    if kind == "npy":
        height, width, *_ = npy_shape(stream.read())
        return height, width
    try:
        image = _opened(stream)
    except UnidentifiedImageError:
        if kind != "tiff":
            raise
        return tiff_shape(stream)
    with image:
        check_size(image.width, image.height, label)
        says = image.format != "PNG" or "exif" in image.info  # a PNG would be decoded to look for more
        turned = says and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """torchvision decodes it to Pillow's pixels and faster, or all 16 bits of it where Pillow would keep eight."""
    if image.format in ("JPEG", "MPO"):
        return image.mode in ("L", "RGB")
    if image.format != "PNG" or "transparency" in image.info or b"eXIf" in data or b"Raw profile type" in data:
        return False
    return image.mode in ("L", "RGB") or _png_bits(data) == 16


def _png_bits(data: bytes) -> int:
    return data[24]  # the header chunk comes first: length, type, width, height, bits


def _is_deep_colour(image: Image.Image) -> bool:
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,))  # pyright: ignore[reportAttributeAccessIssue]
    return len(bits) > 1 and max(bits) > 8


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow remarks on metadata and large sizes; those that matter are checked by us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
