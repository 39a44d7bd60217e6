"""Pixels that Pillow has no mode for: .npy arrays, and TIFF pages of many channels or of more than eight bits."""

import io
import math
import os
import struct
from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vae.errors import InputError, require

SIGNATURES = {b"\x93NUMPY": "npy", b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff", b"MM\0+": "tiff"}
LONGEST_SIGNATURE = 6

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266  # numbers of TIFF's tags
STRIPS, ORIENTATION, CHANNELS, STRIP_ROWS, STRIP_BYTES, PLANAR, PREDICTOR = 273, 274, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT = 322, 323, 324, 325, 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # photometric interpretations
NO_ALPHA, MULTIPLIED, STRAIGHT = 0, 1, 2  # meanings of the sample beside the colour
UNSIGNED, FLOAT = 1, 3  # sample formats
SAMPLES = {(bits, UNSIGNED) for bits in range(8, 17)} | {(bits, FLOAT) for bits in (16, 32, 64)}
PLAIN, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD = 1, 5, 8, 32773, 32946, 34925, 50000
LOSSLESS = {PLAIN, LZW, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA, ZSTD}
UNPREDICTED = {PLAIN, PACKBITS}
MAX_TILE = 2**26  # values in a tile
BAND = 2**24  # bytes that are decoded at a time


def kind_of(start: bytes) -> str | None:
    """Return "npy" or "tiff" by the first bytes of a file, or None where it is neither."""
    return next((kind for signature, kind in SIGNATURES.items() if start.startswith(signature)), None)


def npy_shape(stream: IO[bytes]) -> tuple[int, ...]:
    """Return (H, W) or (H, W, C) from the header of a .npy file.

    Raises InputError where the header promises more than there is, or something that is no image.
    """
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)

    major, _ = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)

    promised = math.prod(shape) * dtype.itemsize
    if len(shape) not in (2, 3) or dtype.hasobject or not 0 < promised <= length:
        raise InputError(f"{dtype} numbers of shape {shape} in {length} bytes, expected (H, W) or (H, W, C) of them")
    return shape


def read_npy(data: bytes) -> np.ndarray:
    """Read the array of a .npy file. Nothing in the file is executed."""
    return np.load(io.BytesIO(data), allow_pickle=False)


class Page(NamedTuple):
    """The first page of a TIFF file, as its tags describe it."""

    width: int
    height: int
    channels: int
    bits: int
    photometric: int
    orientation: int
    tags: Any  # Pillow's {number: values}

    def is_beyond_pillow(self, channels: int) -> bool:
        """Say whether Pillow would lose some of it: bits, channels, or the alpha where `channels` are wanted."""
        is_many = self.photometric != RGB and self.channels > 2
        is_wanted_whole = self.channels == channels and channels not in (1, 3, 4)
        return self.photometric <= RGB and (self.bits > 8 or is_many or is_wanted_whole)


def tiff_page(stream: IO[bytes]) -> Page:
    """Read the tags of the first page. Raise InputError where its tiles are too large to be decoded."""
    start = stream.read(8)
    tags = ImageFileDirectory_v2(start if b"*" in start[2:4] else start + stream.read(8))  # BigTIFF's header is longer
    stream.seek(tags.next)
    tags.load(stream)

    channels = tags.get(CHANNELS, 1)
    tile = (tags.get(TILE_WIDTH, 1), tags.get(TILE_HEIGHT, 1))
    given = f"tiles of {tile[0]}x{tile[1]} pixels and {channels} channels"  # a small image may claim tiles of any size
    require(math.prod(tile) * channels <= MAX_TILE, given, f"{MAX_TILE} values or fewer")

    bits = tags.get(BITS, (1,))
    photometric = tags.get(PHOTOMETRIC, WHITE_IS_ZERO)
    return Page(tags[WIDTH], tags[HEIGHT], channels, max(bits), photometric, tags.get(ORIENTATION, 1), tags)


def read_tiff(data: bytes, page: Page) -> np.ndarray:
    """Decode a page: (H, W, C) of uint8, uint16 or floats, with black as zero and alpha not multiplied in.

    Raises InputError for kinds of pages that are not read.
    """
    kind = page.bits, max(page.tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    compression = page.tags.get(COMPRESSION, PLAIN)
    predictor = 1 if compression in UNPREDICTED else page.tags.get(PREDICTOR, 1)

    known = kind in SAMPLES and compression in LOSSLESS and page.photometric <= RGB
    if not known or (predictor != 1 and (predictor, *kind) not in ((2, 8, UNSIGNED), (2, 16, UNSIGNED))):
        what = f"{kind[0]} bits of format {kind[1]}, compression {compression}, predictor {predictor}"
        raise InputError(f"a TIFF page of {what}, photometric interpretation {page.photometric}: not one that is read")

    planes = [_samples(plane, page, kind[1]) for plane in _planes(data, page)]
    values = np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]

    if predictor == 2:  # values are differences from their left neighbours, anew in each tile
        width = page.tags.get(TILE_WIDTH, page.width)
        for left in range(0, page.width, width):
            tiles = values[:, left : left + width]
            np.cumsum(tiles, axis=1, dtype=tiles.dtype, out=tiles)

    if page.photometric == WHITE_IS_ZERO:
        values = _maximum(values) - values
    return _unmultiplied(values, page)


def _planes(data: bytes, page: Page) -> Iterator[np.ndarray]:
    """Yield the bytes (H, bytes of a row) of all channels side by side, or of each channel where they are stored apart.

    Pillow has the codecs, but modes for few kinds of pages. So it gets the compressed tiles, or strips, in bands. Each
    band is described to it as a grey picture as wide as a row has bytes.
    """
    tags = page.tags
    side = _side(page)
    width = tags.get(TILE_WIDTH, page.width)
    height = tags.get(TILE_HEIGHT, min(page.height, tags.get(STRIP_ROWS, page.height)))
    across, down = math.ceil(page.width / width), math.ceil(page.height / height)

    starts, lengths = (tags[TILES], tags[TILE_BYTES]) if TILES in tags else (tags[STRIPS], tags[STRIP_BYTES])
    parts = [memoryview(data)[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    # Parts that overlap could make a small file take any amount of work.
    whole = [len(part) for part in parts] == list(lengths) and sum(lengths) <= len(data)
    if not whole or len(parts) * side != across * down * page.channels:
        raise InputError("a TIFF page whose parts are missing or overlap")

    row, row_of_part = (math.ceil(pixels * side * page.bits / 8) for pixels in (page.width, width))
    at_once = max(1, BAND // (across * row_of_part * height))

    for first in range(0, len(parts), across * down):
        plane = np.empty((page.height, row), np.uint8)
        for top in range(0, down, at_once):
            start = first + top * across
            end = first + min(top + at_once, down) * across
            band = plane[top * height : (top + at_once) * height]
            band[:] = _grey(parts[start:end], tags, band.shape, (height, row_of_part))
        yield plane


def _side(page: Page) -> int:
    """Return how many channels lie side by side."""
    return 1 if page.tags.get(PLANAR, 1) == 2 else page.channels


def _grey(parts: list[memoryview], tags: Any, size: tuple[int, ...], part: tuple[int, int]) -> np.ndarray:
    """Decode a band of tiles or strips as a grey picture. `size` and `part` are (height, width)."""
    lengths = [len(part) for part in parts]
    starts = list(accumulate(lengths[:-1], initial=8))

    described = {HEIGHT: [size[0]], WIDTH: [size[1]], BITS: [8], PHOTOMETRIC: [BLACK_IS_ZERO], CHANNELS: [1]}
    described |= {tag: [tags.get(tag, 1)] for tag in (COMPRESSION, FILL_ORDER)}
    if TILES in tags:
        described |= {TILE_HEIGHT: [part[0]], TILE_WIDTH: [part[1]], TILES: starts, TILE_BYTES: lengths}
    else:
        described |= {STRIP_ROWS: [part[0]], STRIPS: starts, STRIP_BYTES: lengths}

    with Image.open(io.BytesIO(_file(described, b"".join(parts))), formats=["TIFF"]) as picture:
        return np.asarray(picture)


def _file(tags: dict[int, list[int]], body: bytes) -> bytes:
    """Build a TIFF file: its start, `body` from byte 8 on, and the tags, whose values are all 32-bit integers."""
    body += bytes(len(body) % 2)
    entries = b""
    beyond = b""
    after = 8 + len(body) + 2 + 12 * len(tags) + 4

    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, beyond = struct.pack("<I", after + len(beyond)), beyond + packed
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + packed

    start = b"II" + struct.pack("<HI", 42, 8 + len(body))
    return start + body + struct.pack("<H", len(tags)) + entries + bytes(4) + beyond


def _samples(rows: np.ndarray, page: Page, kind: int) -> np.ndarray:
    """Return the samples (H, W, channels side by side) from the bytes of each row.

    Samples of 9 to 15 bits are scaled to 16.
    """
    shape = (page.height, page.width, _side(page))
    bits = page.bits
    if bits % 8 == 0:
        order, letter = ("<" if page.tags.prefix == b"II" else ">"), ("f" if kind == FLOAT else "u")
        values = rows.view(f"{order}{letter}{bits // 8}").reshape(shape)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    # Samples of other sizes have no numpy type, and are put together from their bits.
    digits = np.unpackbits(rows, axis=1)[:, : shape[1] * shape[2] * bits].reshape(*shape, bits)
    values = sum(digits[..., place] * np.float32(2 ** (bits - 1 - place)) for place in range(bits))
    return np.rint(values * np.float64(65535 / (2**bits - 1))).astype(np.uint16)


def _unmultiplied(values: np.ndarray, page: Page) -> np.ndarray:
    """Return the pixels with their alpha not multiplied in, or without it.

    As in Pillow for eight bits, a fourth sample is alpha, unless the file says that it is of no known kind.
    """
    extra = page.tags.get(EXTRA_SAMPLES, (STRAIGHT,))[0]
    if page.photometric != RGB or page.channels != 4 or extra not in (NO_ALPHA, MULTIPLIED):
        return values

    colour = values[:, :, :3]
    alpha = values[:, :, 3:]
    if extra == NO_ALPHA:
        return colour

    most = _maximum(values)
    straight = np.minimum(colour * (most / np.maximum(alpha, most / 65535).astype(np.float32)), most)
    return np.concatenate([straight if most == 1 else np.rint(straight).astype(values.dtype), alpha], axis=2)


def _maximum(values: np.ndarray) -> int:
    """Return the value that means white: 1 for floats."""
    return 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
