"""What `vae cache-latents` refuses: other models in the same folder, numbers without end, options that cannot be."""

from dataclasses import replace

import pytest

from tests.datasets.conftest import contents
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder

SMALL = ("--resolution", 32, "--shard-images", 3, "--batch-size", 2, "--workers", 0, "--device", "cpu")


def test_another_model_in_the_same_folder_is_refused(call, capsys, model, tiny, pictures, tmp_path):
    command = (pictures, tmp_path / "out", *SMALL)
    assert call("cache-latents", model, *command) == 0
    other = save_autoencoder(AutoencoderKL(replace(tiny, scaling_factor=0.5)), tmp_path / "other")
    assert call("cache-latents", other, *command, "--flip") == 2
    error = capsys.readouterr().err
    assert "begun with stored ['mean', 'logvar'], flip False, scaling_factor 0.18215, encoder '" in error


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", "b.jpg: mean beyond float16; --dtype bfloat16 has room"),
        (1e39, "float32", "b.jpg: NaN or infinite mean from the model; vae inspect says whether"),
    ],
)
def test_numbers_that_are_not_finite_stop_with_the_images_name(
    call, capsys, monkeypatch, model, pictures, tmp_path, value, dtype, message
):
    encode = AutoencoderKL.encode

    def second_too_large(self, images):
        posterior = encode(self, images)
        posterior.mean[1:] *= value * 1000
        return posterior

    monkeypatch.setattr(AutoencoderKL, "encode", second_too_large)
    assert call("cache-latents", model, pictures, tmp_path / "out", *SMALL, "--dtype", dtype) == 2
    assert message in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["recipe.json"]
    if dtype == "float16":
        assert call("cache-latents", model, pictures, tmp_path / "roomy", *SMALL, "--dtype", "bfloat16") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", 33), "--resolution 33, expected a multiple of 2"),
        (("--dtype", "int8"), "--dtype int8, expected one of ['float16', 'bfloat16', 'float32']"),
        (("--sample", -1), "--sample -1, expected a seed of 0 or more"),
        (("--device", "abacus"), "device='abacus' is not to be had"),
        (("--family", "flux"), "--family flux, expected one of"),
    ],
)
def test_refused_options_are_one_line_and_status_two(call, capsys, model, pictures, tmp_path, arguments, message):
    assert call("cache-latents", model, pictures, tmp_path / "out", *SMALL, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
