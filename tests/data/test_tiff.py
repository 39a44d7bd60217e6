"""Pages that Pillow has no mode for, as tifffile and numpy have them; kinds.py has those that are refused."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from tests.data.tiffs import (
    BLACK_IS_ZERO,
    CMYK,
    COMPRESSION,
    DEFLATE,
    EXTRA_SAMPLES,
    LZW,
    RGB,
    SAMPLE_FORMAT,
    WHITE_IS_ZERO,
    lzw,
    tiff,
)
from vae.data.decode import ImageError, image_size, open_image
from vae.data.pixels import UPRIGHT

HEIGHT, WIDTH = 50, 70
LAYOUTS: dict[str, dict[str, Any]] = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (32, 48)},
    "deflated strips": {"rowsperstrip": 7, "compression": "zlib"},
    "deflated tiles": {"tile": (16, 16), "compression": "zlib"},
    "differences in strips": {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
    "differences in tiles": {"tile": (32, 48), "compression": "zlib", "predictor": True},
    "BigTIFF": {"bigtiff": True},
}


def _drawn(dtype: type, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == np.float32:
        return rng.random(shape, dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _saved(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def _opened(data: bytes, channels: int, bits: int = 16) -> np.ndarray:
    return open_image(data, channels, bits).numpy()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (layout, dtype)
        for layout, dtype in product(LAYOUTS, (np.uint8, np.uint16, np.float32))
        if dtype != np.float32 or "differences" not in layout  # of integers only
    ],
)
def test_every_layout_of_a_page_holds_what_was_written(layout, dtype):
    """In either byte order, channels side by side or apart, as colour, grey, or grey with white as zero."""
    depth = 8 if dtype == np.uint8 else 16
    for channels, planar, order, photometric in product(
        range(1, 7), ("contig", "separate"), "<>", ("minisblack", "miniswhite", "rgb")
    ):
        if (photometric == "rgb" and channels < 3) or (planar == "separate" and channels == 1):
            continue
        if (layout, order) == ("BigTIFF", ">"):  # which Pillow takes for a small one
            continue
        values = _drawn(dtype, channels, HEIGHT, WIDTH)
        stored = values if planar == "separate" else values.transpose(1, 2, 0)
        options = LAYOUTS[layout] | {"photometric": photometric, "byteorder": order}
        options |= {"planarconfig": planar} if channels > 1 else {}
        options |= {"extrasamples": ["unassalpha"]} if (photometric, channels) == ("rgb", 4) else {}
        data = _saved(stored[..., 0] if channels == 1 else stored, **options)
        expected = (
            values if photometric != "miniswhite" else (1 if dtype == np.float32 else np.iinfo(dtype).max) - values
        )
        if dtype == np.float32:
            expected = np.round(expected.astype(np.float64) * 65535).astype(np.uint16)
        case = f"{channels} channels, {options}"
        assert np.array_equal(_opened(data, channels, depth), expected), case
        assert image_size(data) == (HEIGHT, WIDTH), case


def test_compression_that_only_libtiff_knows_keeps_sixteen_bits():
    values = _drawn(np.uint16, HEIGHT, WIDTH, 3)
    data = tiff((WIDTH, HEIGHT), [16] * 3, RGB, lzw(values.tobytes()), {COMPRESSION: LZW})
    assert np.array_equal(_opened(data, 3), values.transpose(2, 0, 1))
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), values >> 8), "the eight bits that Pillow keeps"


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_depths_between_eight_and_sixteen_bits_are_scaled_to_the_whole_range(bits):
    values = _drawn(np.uint16, HEIGHT, WIDTH) >> (16 - bits)
    digits = (values[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(digits.reshape(HEIGHT, -1).astype(np.uint8), axis=1)
    data = tiff((WIDTH, HEIGHT), [bits], BLACK_IS_ZERO, packed.tobytes(), {})
    expected = np.round(values * (65535 / (2**bits - 1)))
    assert np.array_equal(_opened(data, 1)[0], expected)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_fourth_sample_of_sixteen_bits_means_what_it_means_to_pillow_for_eight(kind, channels):
    """Nothing known, alpha that colour is multiplied by, or straight alpha."""
    values = _drawn(np.uint8, HEIGHT, WIDTH, 4)
    values[..., 3] |= 128  # of much less, eight multiplied bits would say little
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    eight, sixteen = (
        tiff((WIDTH, HEIGHT), [bits] * 4, RGB, pixels.tobytes(), {EXTRA_SAMPLES: kind})
        for bits, pixels in ((8, values), (16, values.astype(np.uint16) * 257))
    )
    difference = _opened(sixteen, channels, 8).astype(int) - _opened(eight, channels, 8)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (3, np.uint16), (5, np.uint8)])
def test_orientation_is_obeyed_where_pillow_does_not_read_the_page(orientation, channels, dtype):
    values = _drawn(dtype, HEIGHT, WIDTH, channels)
    data = _saved(
        values if channels > 1 else values[..., 0],
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extratags=[(274, "H", 1, orientation, True)],
    )
    stored = torch.from_numpy(values).permute(2, 0, 1)
    expected = UPRIGHT.get(orientation, torch.clone)(stored)
    opened = open_image(data, channels, 8 if dtype == np.uint8 else 16)
    assert np.array_equal(opened.numpy(), expected.numpy())
    assert image_size(data) == tuple(opened.shape[1:])


def test_inks_of_sixteen_bits_are_pillows():
    values = _drawn(np.uint16, HEIGHT, WIDTH, 4)
    data = tiff((WIDTH, HEIGHT), [16] * 4, CMYK, values.tobytes(), {})
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(open_image(data).permute(1, 2, 0), np.asarray(image.convert("RGB")))


def test_grey_that_is_multiplied_by_its_alpha_is_composited_on_white():
    values = np.stack([np.full((HEIGHT, WIDTH), 64), np.full((HEIGHT, WIDTH), 128)], axis=-1).astype(np.uint8)
    opened = open_image(tiff((WIDTH, HEIGHT), [8, 8], BLACK_IS_ZERO, values.tobytes(), {EXTRA_SAMPLES: 1}))
    assert (opened - (64 + 127)).int().abs().max() <= 1


@pytest.mark.parametrize(
    ("dtype", "kind", "photometric"),
    [(np.uint32, 1, BLACK_IS_ZERO), (np.int16, 2, BLACK_IS_ZERO), (np.float64, 3, WHITE_IS_ZERO)],
)
def test_numbers_without_an_agreed_range_are_refused(dtype, kind, photometric):
    values = np.full((HEIGHT, WIDTH), 200, dtype)
    data = tiff((WIDTH, HEIGHT), [8 * values.itemsize], photometric, values.tobytes(), {SAMPLE_FORMAT: kind})
    with pytest.raises(ImageError, match=r"mine\.tif: .*; convert or remove it"):
        open_image(data, name="mine.tif")


def test_a_strip_that_goes_on_after_the_image_is_read_up_to_its_end():
    values = _drawn(np.uint16, HEIGHT, WIDTH, 3)
    data = _saved(np.pad(values, ((0, 1000), (0, 0), (0, 0))), photometric="rgb", compression="zlib", rowsperstrip=2000)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        part = data[page.dataoffsets[0] : page.dataoffsets[0] + page.databytecounts[0]]
    whole = tiff((WIDTH, HEIGHT), [16] * 3, RGB, part, {COMPRESSION: DEFLATE})
    assert np.array_equal(_opened(whole, 3), values.transpose(2, 0, 1))
