"""TIFF files put together by hand: those that nothing here can write, and those that ask for more than they hold."""

import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

DEFLATE, LZW = 8, 5
COMPRESSION, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, EXTRA_SAMPLES, SAMPLE_FORMAT = 259, 317, 322, 323, 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5


def tiff(size: tuple[int, int], bits: list[int], photometric: int, part: bytes, tags: dict[int, int]) -> bytes:
    """A page (width, height) that is one strip, or one tile where `tags` give its size."""
    starts, lengths = (324, 325) if TILE_WIDTH in tags else (273, 279)
    known = {256: [size[0]], 257: [size[1]], 258: bits, COMPRESSION: [1], 262: [photometric], 277: [len(bits)]}
    return written(known | {starts: [8], lengths: [len(part)]} | {tag: [n] for tag, n in tags.items()}, part)


def written(tags: dict[int, list[int]], body: bytes) -> bytes:
    """`body` from byte 8 on, and tags whose values all are 32-bit integers."""
    after = list(accumulate((4 * len(n) for _, n in sorted(tags.items())), initial=8 + len(body) + 6 + 12 * len(tags)))
    entries, values = b"", b""
    for place, (tag, numbers) in zip(after[:-1], sorted(tags.items()), strict=True):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + (
            packed if len(numbers) == 1 else struct.pack("<I", place)
        )
        values += packed
    start = b"II*\0" + struct.pack("<I", 8 + len(body))
    return start + body + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def lzw(data: bytes) -> bytes:
    """By the book, though nothing is compressed: the table is cleared before a code needs ten bits."""
    codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])]
    digits = "".join(f"{code:09b}" for code in (*codes, 257))
    length = -(-len(digits) // 8)
    return int(digits.ljust(8 * length, "0"), 2).to_bytes(length, "big")


@lru_cache(maxsize=1)
def _gigabyte() -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(2**10)) + packer.flush()


def _tiled(width: int, height: int, channels: int, bits: int) -> bytes:
    """64 pixels each way, in one tile of a gigabyte."""
    tags = {COMPRESSION: DEFLATE, TILE_WIDTH: width, TILE_HEIGHT: height}
    return tiff((64, 64), [bits] * channels, RGB if channels == 3 else BLACK_IS_ZERO, _gigabyte(), tags)


def _overlapping() -> bytes:
    """4,000 strips, each of the whole megabyte."""
    tags = {256: [1000], 257: [4000], 258: [16] * 3, COMPRESSION: [1], 262: [RGB], 277: [3], 278: [1]}
    return written(tags | {273: [8] * 4000, 279: [2**20] * 4000}, bytes(2**20))


def _many_channels() -> bytes:
    """6 MB of strips that hold 6 GB."""
    strip = zlib.compress(bytes(10 * 9_000 * 60))
    tags = {
        256: [9_000],
        257: [10_000],
        258: [8] * 60,
        COMPRESSION: [DEFLATE],
        262: [BLACK_IS_ZERO],
        277: [60],
        278: [10],
    }
    starts = [8 + number * len(strip) for number in range(1_000)]
    return written(tags | {273: starts, 279: [len(strip)] * 1_000}, strip * 1_000)


BOMBS: dict[str, Callable[[], bytes]] = {  # a reader that believes them takes a gigabyte or more
    "a TIFF tile larger than its image": lambda: _tiled(2**15, 2**15, 1, 8),
    "such a tile of 16-bit colour": lambda: _tiled(2**13, 2**14, 3, 16),
    "such a tile of five channels": lambda: _tiled(2**14, 2**14, 5, 8),
    "a TIFF page of sixty channels": _many_channels,
    "a TIFF page without its pixels": lambda: tiff((9_999, 9_999), [16] * 3, RGB, b"", {}),
    "TIFF strips that are all the same": _overlapping,
}
