"""What no kind of image shows by itself: the fast decoder, transparent colours, orders of bytes, memory and threads."""

import io
import re
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from tests.data.kinds import HEIGHT, PHOTO, TRANSLUCENT, WIDTH, encoded, pixels, png, png_header
from vae.data import decode
from vae.data.decode import ImageError, image_size, open_image
from vae.data.loader import hash_of_pixels
from vae.data.pixels import as_depth

RGB, GREY, GREY_ALPHA, RGB_ALPHA = 2, 0, 4, 6  # colour types of PNG


def _png(values: np.ndarray, colour: int, *before: tuple[bytes, bytes]) -> bytes:
    """Of 16 bits (H, W, C)."""
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = png_header(values.shape[1], values.shape[0], 16, colour)
    return png(header, *before, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


@pytest.mark.parametrize("size", [(512, 512), (37, 61), (8, 9)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "quality": 3},
        {"subsampling": 0, "quality": 100, "progressive": True},
        {"subsampling": 2, "progressive": True, "optimize": True},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_the_fast_decoder_gives_pillows_pixels(monkeypatch, size, mode, options):
    file = encoded(Image.fromarray(data.astronaut()[: size[0], : size[1]]).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(image.convert("RGB"))
    monkeypatch.setattr(decode, "from_array", None)  # of the slow one
    assert np.array_equal(open_image(file).permute(1, 2, 0), expected)


@pytest.mark.parametrize("colour", [GREY, RGB])
def test_a_colour_of_sixteen_bits_that_means_transparent_lets_white_through(colour):
    """It is compared in all its bits."""
    channels = 1 if colour == GREY else 3
    values = np.full((HEIGHT, WIDTH, channels), 0x1234, np.uint16)
    values[0, 0] = 0x1235
    file = _png(values, colour, (b"tRNS", b"\x12\x34" * channels))
    opened = open_image(file, bits=16)
    assert (opened[:, 0, 0] == 0x1235).all()
    assert (opened[:, 1:] == 65535).all()
    assert open_image(file, 4, 16)[3].unique().tolist() == [0, 65535]


def test_orientation_in_xmp_is_obeyed_and_known_from_the_header():
    said = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    rows = b"".join(b"\0" + row.tobytes() for row in pixels())
    file = png(png_header(WIDTH, HEIGHT, 8, RGB), (b"iTXt", said), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    turned = np.asarray(PHOTO.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(open_image(file).permute(1, 2, 0), turned)
    assert image_size(file) == (WIDTH, HEIGHT)


def test_sixteen_bits_survive_being_turned():
    exif = Image.Exif()
    exif[0x0112] = 8
    file = _png(pixels(3, 65536) + 1, RGB, (b"eXIf", exif.tobytes()[6:]))
    assert np.array_equal(open_image(file, bits=16).permute(1, 2, 0), np.rot90(pixels(3, 65536) + 1))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<f2", ">f4", "<f8", "?"])
def test_arrays_of_every_order_of_bytes_are_scaled_alike(tmp_path, dtype):
    shares = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    values = (shares * 65535 if "u" in dtype else shares.round() if dtype == "?" else shares).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", np.asfortranarray(values))
    for name in ("a.npy", "b.npy"):
        opened = open_image(tmp_path / name, 1, 16)[0].int()
        expected = values.astype(np.float64) * (1 if "u" in dtype else 65535)
        assert np.array_equal(opened, np.round(expected))
    assert image_size(tmp_path / "b.npy") == (HEIGHT, WIDTH)


@pytest.mark.parametrize("given", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5])
def test_channels_become_as_many_as_are_wanted_or_the_image_is_refused(given, wanted):
    """Pillow is the authority where it has both modes."""
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    values = torch.from_numpy(np.asarray(TRANSLUCENT if given == 4 else pixels(given)).copy()).permute(2, 0, 1)
    if given != wanted and (wanted in (2, 5) or given == 5):
        with pytest.raises(ImageError, match=f"mine: {given} channels, expected {wanted}"):
            open_image(values, wanted, name="mine")
        return
    opened = open_image(values, wanted).permute(1, 2, 0).numpy().astype(int)
    if given == 5 or wanted in (2, 5):
        expected = values.permute(1, 2, 0).numpy()
    else:
        array = values.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if given == 1 else array, modes[given])
        if wanted != 4 and given in (2, 4):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        expected = np.asarray(image.convert(modes[wanted])).reshape(opened.shape)
    assert np.abs(opened - expected).max() <= (1 if given in (2, 4) and wanted != 4 else 0)


def test_batches_are_scaled_like_images():
    batch = torch.randint(0, 65536, (2, 3, 300, 5), dtype=torch.int32).to(torch.uint16)
    eight = as_depth(batch, 8)
    assert np.array_equal(eight, np.round(batch.numpy() / 257))
    assert np.array_equal(as_depth(eight, 16), eight.numpy().astype(int) * 257)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_large_image_takes_a_few_times_its_own_memory(tmp_path):
    """Composited in numbers of eight bytes it would be twenty times."""
    np.save(tmp_path / "large.npy", np.full((4000, 4000, 4), 200, np.uint8))
    size = (tmp_path / "large.npy").stat().st_size
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    assert open_image(tmp_path / "large.npy").shape == (3, 4000, 4000)
    assert _memory("VmHWM") - before < 6 * size


def _memory(field: str) -> int:
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_threads_that_read_side_by_side_leave_warnings_as_they_were(monkeypatch):
    """The first comes in before the second and leaves before it."""
    both, original = threading.Barrier(2), decode._upright_size
    first_has_left = threading.Event()

    def size(stream, label):
        both.wait()
        if label == "second":
            first_has_left.wait()
        warnings.warn("of no interest", stacklevel=1)
        return original(stream, label)

    monkeypatch.setattr(decode, "_upright_size", size)
    before = list(warnings.filters)
    threads = [threading.Thread(target=image_size, args=(encoded(PHOTO, "PNG"), name)) for name in ("first", "second")]
    threads[1].start()
    threads[0].start()
    threads[0].join()
    first_has_left.set()
    threads[1].join()
    assert warnings.filters == before


def test_the_hash_of_an_image_tells_values_shape_and_depth_and_not_how_it_lies_in_memory():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    known = hash_of_pixels(image)
    for strides in (image.contiguous(), image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert hash_of_pixels(strides) == known
    one_less = image.clone()
    one_less[0, 0, 0] ^= 1
    flat = image.permute(1, 2, 0).reshape(1, -1, 3).permute(2, 0, 1)
    others = [one_less, flat, image.transpose(1, 2), image.flip(0), image.to(torch.uint16)]
    assert len({known, *map(hash_of_pixels, others)}) == 6
