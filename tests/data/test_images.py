import os

import numpy as np
import pytest
import torch
from PIL import Image

from vae.data import decode
from vae.data.decode import ImageError, open_image

RED = (200, 30, 40)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_every_common_format_opens_as_rgb(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (16, 8), RED).save(path)
    image = open_image(path)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 8, 16))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - RED).max() <= 4


def test_exif_rotation_is_applied(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to see it upright
    photo.save(tmp_path / "rotated.png", exif=exif)
    upright = open_image(tmp_path / "rotated.png")
    assert np.array_equal(upright.permute(1, 2, 0), photo.transpose(Image.Transpose.ROTATE_270))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    opened = open_image(tmp_path / "deep.png", channels=1)[0].numpy().astype(int)
    assert np.abs(opened - values / 257).max() <= 1


def test_transparency_lets_white_through(tmp_path):
    Image.new("RGBA", (8, 8), (*RED, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (*RED, 255)).save(tmp_path / "solid.png")
    assert open_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [255, 255, 255]
    assert open_image(tmp_path / "solid.png")[:, 0, 0].tolist() == list(RED)


def test_palettes_cmyk_bilevel_and_greyscale_become_what_was_asked_for(tmp_path, photo):
    for mode, suffix in (("P", "png"), ("CMYK", "tiff"), ("1", "png"), ("L", "png"), ("LA", "png")):
        path = tmp_path / f"{mode}.{suffix}"
        photo.convert(mode).save(path)
        assert open_image(path).shape == (3, 20, 30)
        assert open_image(path, channels=1).shape == (1, 20, 30)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_what_is_no_image_is_refused_with_its_name(tmp_path, photo):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    for name in ("text.png", "empty.png", "folder.png", "pipe.png", "half.jpg", "float.tiff", "absent.png"):
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, photo):
    monkeypatch.setattr(decode, "MAX_PIXELS", 500)
    photo.save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="30x20 pixels, more than 500"):
        open_image(tmp_path / "large.png")
