"""`--memory` of `vae encode`, `decode`, `reconstruct`."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vae.cli.common import bytes_named


def test_latents_and_images_within_a_bound_are_those_without(call, model, photos, tmp_path):
    for name, bound in (("whole", ()), ("strips", ("--memory", "1.5MB"))):
        assert call("encode", model, photos, "--output", tmp_path / name, *bound) == 0
        assert call("decode", model, tmp_path / name, "--output", tmp_path / f"{name} out", *bound) == 0
        options = ("--output", tmp_path / f"{name} look", "--resolution", 32, *bound)
        assert call("reconstruct", model, photos / "a.png", *options) == 0
    whole, strips = (load_file(tmp_path / name / "b_jpg.latent")["latent_tensor"] for name in ("whole", "strips"))
    torch.testing.assert_close(strips, whole, atol=1e-4, rtol=0)
    for picture in ("out/b_jpg.png", "look/a_png.png"):
        pixels = [np.asarray(Image.open(tmp_path / f"{name} {picture}")).astype(int) for name in ("whole", "strips")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(("text", "size"), [("2GB", 2_000_000_000), ("500 mb", 500_000_000), ("1.5GiB", 3 * 2**29)])
def test_memory_is_a_number_with_a_unit(text, size):
    assert bytes_named(text) == size


@pytest.mark.parametrize("text", ["2", "much", "-1GB", "1e3MB", "0.001MB"])
def test_what_is_no_memory_or_too_little_is_refused(call, capsys, model, photos, tmp_path, text):
    assert call("encode", model, photos / "a.png", "--output", tmp_path / "out", "--memory", text) == 2
    assert "memory" in capsys.readouterr().err
