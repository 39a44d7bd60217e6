"""Every kind of image that data sets have: the whole ones decode by the stated rule, the others are refused by name."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from tests.data.kinds import BAD, GOOD, HEIGHT, PHOTO, TRANSLUCENT, WIDTH, deep_rgb_png, on_white, pixels, turned
from vae.data.decode import ImageError, image_size, open_image

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_SECONDS, MOST_MEMORY = 2.0, 500e6


def _write(folder: Path, suffix: str, write) -> Path:
    path = folder / f"image{suffix}"
    write(path)
    return path


def _array(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", GOOD)
def test_a_whole_image_decodes_to_what_it_must_look_like(tmp_path, kind):
    suffix, write, expected = GOOD[kind]
    path = _write(tmp_path, suffix, write)
    if expected is None:
        with Image.open(path) as image:
            expected = on_white(image)
    opened = open_image(path)
    assert (opened.dtype, tuple(opened.shape)) == (torch.uint8, (3, HEIGHT, WIDTH))
    authority = expected(path) if callable(expected) else expected
    tolerance = 1 if "alpha" in kind or "transparency" in kind else 0  # of Pillow's integer compositing
    assert np.abs(_array(opened).astype(int) - authority).max() <= tolerance
    assert torch.equal(open_image(path.read_bytes()), opened)
    assert image_size(path) == image_size(path.read_bytes()) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_of_exif_is_turned_upright_as_pillow_does(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    PHOTO.save(path, format=kind, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(_array(open_image(path)), expected)
    assert image_size(path) == expected.shape[:2]


def test_an_orientation_that_is_none_changes_nothing(tmp_path):
    turned(99)(tmp_path / "odd.png")
    assert np.array_equal(_array(open_image(tmp_path / "odd.png")), pixels())


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_one_error_that_names_it_at_once(tmp_path, kind):
    suffix, write = BAD[kind]
    path = _write(tmp_path, suffix, write)
    began = time.perf_counter()
    with pytest.raises(ImageError) as error:
        open_image(path)
    assert time.perf_counter() - began < MOST_SECONDS
    assert str(error.value).startswith(str(path))
    assert "; " in str(error.value)
    assert str(error.value).isprintable()


def test_thirty_kinds_and_more_were_tried():
    print(f"{len(GOOD)} whole, 8 orientations in 4 formats, {len(BAD)} that are none")
    assert len(GOOD) + 8 + len(BAD) >= 30


def test_none_of_them_takes_much_memory(tmp_path):
    """In an interpreter of its own, whose peak is that of these images."""
    files = [_write(tmp_path, f"{number}{suffix}", write) for number, (suffix, write) in enumerate(BAD.values())]
    run = subprocess.run(
        [sys.executable, "-m", "tests.data.test_bad_images", *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout)
    print(f"{grown / 1e6:.0f} MB for {len(files)} images")
    assert grown < MOST_MEMORY


def test_channels_are_what_is_asked_for(tmp_path):
    TRANSLUCENT.save(tmp_path / "a.png")
    PHOTO.save(tmp_path / "b.png")
    assert np.array_equal(_array(open_image(tmp_path / "a.png", channels=4)), np.asarray(TRANSLUCENT))
    assert np.array_equal(_array(open_image(tmp_path / "b.png", channels=1))[..., 0], np.asarray(PHOTO.convert("L")))
    opaque = _array(open_image(tmp_path / "b.png", channels=4))
    assert np.array_equal(opaque, np.asarray(PHOTO.convert("RGBA")))
    for channels in (2, 5):
        np.save(tmp_path / "many.npy", pixels(channels))
        assert np.array_equal(_array(open_image(tmp_path / "many.npy", channels=channels)), pixels(channels))
        tifffile.imwrite(tmp_path / "many.tif", pixels(channels), photometric="minisblack", planarconfig="contig")
        assert np.array_equal(_array(open_image(tmp_path / "many.tif", channels=channels)), pixels(channels))
    with pytest.raises(ImageError, match="5 channels, expected 3"):
        open_image(tmp_path / "many.npy")


def test_sixteen_bits_are_kept_where_they_are_asked_for(tmp_path):
    deep_rgb_png(tmp_path / "deep.png")
    tifffile.imwrite(tmp_path / "deep.tif", pixels(3, 65536))
    for name in ("deep.png", "deep.tif"):
        opened = open_image(tmp_path / name, bits=16)
        assert opened.dtype == torch.uint16
        assert np.array_equal(_array(opened), pixels(3, 65536))
    PHOTO.save(tmp_path / "shallow.png")
    assert np.array_equal(_array(open_image(tmp_path / "shallow.png", bits=16)), pixels().astype(np.uint16) * 257)


def test_a_tensor_is_taken_as_it_is_and_another_is_refused():
    given = torch.from_numpy(pixels()).permute(2, 0, 1)
    assert torch.equal(open_image(given), given)
    with pytest.raises(ImageError, match=r"a torch\.float32 tensor"):
        open_image(given.float(), name="mine")


def _main(files: list[str]) -> None:
    open_image(torch.zeros(3, 9, 9, dtype=torch.uint8))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = _peak()
    for file in files:
        try:
            open_image(file)
        except ImageError:
            continue
        raise AssertionError(file)
    print(_peak() - before)


def _peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # pyright: ignore


if __name__ == "__main__":
    _main(sys.argv[1:])
