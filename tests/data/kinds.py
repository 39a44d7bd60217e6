"""The kinds of image that data sets have: whole ones with what they must look like, and those that are none.

GOOD: name -> (what writes the file, what it must decode to, uint8 (H, W, 3)). BAD: name -> what writes the file.
"""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, PngImagePlugin

from tests.data.tiffs import BOMBS

HEIGHT, WIDTH = 24, 40
Write = Callable[[Path], object]


def pixels(channels: int = 3, high: int = 256, seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG keeps it, and different everywhere."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [(rows * (5 + seed) + columns * (3 + channel) + 31 * channel) % 200 for channel in range(channels)]
    return (np.stack(planes, axis=-1) * (high // 256)).astype(np.uint8 if high == 256 else np.uint16)


PHOTO = Image.fromarray(pixels())
ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
TRANSLUCENT = PHOTO.copy()
TRANSLUCENT.putalpha(ALPHA)


def as_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def on_white(image: Image.Image) -> np.ndarray:
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def saved(image: Image.Image, **options: Any) -> Write:
    return lambda path: image.copy().save(path, **options)  # Pillow leaves notes on what it saved


def moving(**options: Any) -> Write:
    """Two frames or pages, the second another one."""
    return lambda path: FIRST.copy().save(path, save_all=True, append_images=[SECOND.copy()], **options)


def written(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int, bits: int = 8, colour: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that would be an image of any size."""
    return png(png_header(width, height, 1), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))


def text_bomb() -> bytes:
    """200 MB of text in 200 KB, in front of the pixels."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1_000_000)) for _ in range(200)) + packer.flush()
    return png(
        png_header(16, 16), (b"zTXt", b"Comment\0\0" + packed), (b"IDAT", zlib.compress(bytes(272))), (b"IEND", b"")
    )


def deep_rgb_png(path: Path) -> None:
    """Pillow cannot write 16-bit colour."""
    rows = pixels(3, 65536).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(png(png_header(WIDTH, HEIGHT, 16, 2), (b"IDAT", zlib.compress(data)), (b"IEND", b"")))


def turned(orientation: int) -> Write:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(PHOTO, format="PNG", exif=exif)


def rounded(values: np.ndarray) -> np.ndarray:
    """16 bits as 8: divided by 257, to the nearest."""
    return np.round(values / 257.0).astype(np.uint8)


def flipped_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :]


def _noted() -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "of no use. " * 50_000, zip=True)
    return notes


def _made(make: Callable[[], bytes]) -> Write:
    return lambda path: path.write_bytes(make())


JPEG, PNG = encoded(PHOTO, "JPEG"), encoded(PHOTO, "PNG")
GREY, DEEP = pixels(1)[..., 0], pixels(1, 65536)[..., 0]
FIRST, SECOND = (Image.fromarray(pixels(seed=seed)) for seed in (0, 5))
PROFILE = random.Random(0).randbytes(1_000_000)

GOOD: dict[str, tuple[str, Write, Any]] = {
    "a JPEG": (".jpg", written(JPEG), as_pillow),
    "a progressive JPEG without subsampling": (".jpg", saved(PHOTO, progressive=True, subsampling=0), as_pillow),
    "a greyscale JPEG": (".jpg", saved(PHOTO.convert("L")), as_pillow),
    "a PNG": (".png", written(PNG), pixels()),
    "CMYK": (".jpg", saved(PHOTO.convert("CMYK")), as_pillow),
    "grey with alpha": (".png", saved(TRANSLUCENT.convert("LA")), on_white(TRANSLUCENT.convert("LA"))),
    "a palette with transparency": (".png", saved(PHOTO.quantize(16), transparency=3), None),
    "one bit": (".png", saved(PHOTO.convert("1")), as_pillow),
    "16-bit grey PNG": (".png", saved(Image.fromarray(DEEP)), np.stack([rounded(DEEP)] * 3, axis=-1)),
    "16-bit colour PNG": (".png", deep_rgb_png, rounded(pixels(3, 65536))),
    "16-bit colour TIFF": (".tif", lambda path: tifffile.imwrite(path, pixels(3, 65536)), rounded(pixels(3, 65536))),
    "floating point in [0, 1]": (
        ".tif",
        saved(Image.fromarray((GREY / 255.0).astype(np.float32))),
        np.stack([GREY] * 3, axis=-1),
    ),
    "alpha": (".png", saved(TRANSLUCENT), on_white(TRANSLUCENT)),
    "alpha of 0": (".png", saved(Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 0))), np.full((HEIGHT, WIDTH, 3), 255)),
    "an animated GIF": (".gif", moving(), as_pillow),
    "an animated WebP": (".webp", moving(lossless=True), pixels()),
    "a huge ICC profile": (".jpg", saved(PHOTO, icc_profile=PROFILE), as_pillow),
    "MPO": (".jpg", moving(format="MPO"), as_pillow),
    "several pages": (".tif", moving(), pixels()),
    "the wrong extension": (".png", saved(PHOTO, format="BMP"), pixels()),
    "a long text chunk": (".png", saved(PHOTO, pnginfo=_noted()), pixels()),
    "an array": (".npy", lambda path: np.save(path, pixels()), pixels()),
    "BMP": (".bmp", saved(PHOTO), pixels()),
    "a wrong checksum behind the pixels": (".png", written(flipped_bit(PNG, len(PNG) - 14)), pixels()),
}

BAD: dict[str, tuple[str, Write]] = {
    "no byte": (".png", written(b"")),
    "text": (".jpg", written(b"not an image, but long enough to be one" * 9)),
    "a JPEG cut in its header": (".jpg", written(JPEG[:100])),
    "a JPEG cut in its pixels": (".jpg", written(JPEG[: len(JPEG) * 2 // 3])),
    "a PNG cut in its pixels": (".png", written(PNG[: len(PNG) * 2 // 3])),
    "a flipped bit in the PNG's pixels": (".png", written(flipped_bit(PNG, len(PNG) // 2))),
    "a wrong checksum of the header": (".png", written(flipped_bit(PNG, 30))),
    "144 million pixels": (".png", written(png_bomb(12_000, 12_000))),
    "400 million pixels": (".png", written(png_bomb(20_000, 20_000))),
    "1 x 20000": (".png", saved(Image.new("L", (20_000, 1)))),
    "1 x 1": (".png", saved(Image.new("RGB", (1, 1)))),
    "a text bomb": (".png", written(text_bomb())),
    "floating point outside [0, 1]": (".tif", saved(Image.fromarray(GREY.astype(np.float32)))),
    "floating point that is not finite": (".npy", lambda path: np.save(path, np.full((9, 9), np.nan))),
    "a folder": (".png", Path.mkdir),
    "a FIFO": (".png", os.mkfifo),
    "a link to nowhere": (".png", lambda path: path.symlink_to("/nowhere/at/all.png")),
    "a link to a device": (".png", lambda path: path.symlink_to("/dev/zero")),
    "SVG": (".png", written(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')),
    "HTML": (".jpg", written(b"<!doctype html><title>404</title>")),
    "PostScript": (".jpg", written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "an array of objects": (".npy", lambda path: np.save(path, np.array([[Path()] * 9] * 9), allow_pickle=True)),
    "an array that promises more": (".npy", lambda path: path.write_bytes(_lying_array())),
    "five channels": (".npy", lambda path: np.save(path, pixels(5))),
    "numbers with a sign": (".npy", lambda path: np.save(path, pixels().astype(np.int64))),
    "no channel": (".npy", lambda path: np.save(path, pixels()[..., :0])),
} | {name: (".tif", _made(make)) for name, make in BOMBS.items()}


def _lying_array() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (300_000, 300_000, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(1000)
