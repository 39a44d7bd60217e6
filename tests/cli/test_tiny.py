"""The `vae` command with a tiny autoencoder, and the latents of KL ones that it shows."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.presets import TINY
from vae.cli import app
from vae.cli.common import raw_latents
from vae.errors import InputError
from vae.files import WeightsError
from vae.latents import scale_latents
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.weights import save_autoencoder
from vae.weights.latent_files import scale_in, write_latents


def test_raw_latents_of_a_kl_autoencoder_are_scaled_by_what_their_file_states(tmp_path, tiny):
    kl = replace(tiny, latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
    latents, path = torch.randn(1, 4, 4, 4), tmp_path / "a.latent"
    write_latents(path, latents, kl, scaled=False, drawn="mean")
    torch.testing.assert_close(raw_latents(path, TINY(), None), scale_latents(latents, kl))
    assert torch.equal(raw_latents(path, kl, None), latents)
    write_latents(path, latents, kl, scaled=True, drawn="mean")
    assert torch.equal(raw_latents(path, TINY(), None), latents)


def test_raw_latents_that_do_not_state_their_scale_need_a_family(tmp_path):
    latents, path = torch.randn(1, 4, 4, 4), tmp_path / "comfy.latent"
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.empty(0)}, path)
    with pytest.raises(InputError, match="raw latents that do not tell their scale, expected --family with it"):
        raw_latents(path, TINY(), None)
    torch.testing.assert_close(raw_latents(path, TINY(), "sdxl"), latents * 0.13025)
    save_file({"latent_tensor": latents}, path, {"vae.latents": "{}"})
    with pytest.raises(WeightsError, match=r"its vae\.latents is not readable"):
        scale_in(path, 4)


def test_the_commands_take_a_tiny_autoencoder(tmp_path):
    pair = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "taesd_decoder.safetensors", "taesd")
    model, run = str(pair), CliRunner().invoke
    Image.new("RGB", (32, 32), "green").save(tmp_path / "photo.png")
    picture = str(tmp_path / "photo.png")
    for arguments in (
        ["inspect", model, "--audit", "photos", "--resolution", "32"],
        ["convert", model, str(tmp_path / "mine_decoder.safetensors")],
        ["convert", model, str(tmp_path / "folder"), "--dtype", "float16"],
        ["encode", model, picture, "--output", str(tmp_path)],
        ["decode", model, str(tmp_path / "photo_png.latent"), "--output", str(tmp_path / "decoded")],
    ):
        result = run(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["_class_name"] == "AutoencoderTiny"
    assert len(list((tmp_path / "decoded").iterdir())) == 1
    assert list(load_file(tmp_path / "photo_png.latent")) == ["scaled_latents"]
    with pytest.raises(InputError, match="--fp16-safe with a tiny autoencoder, expected none"):
        run(app, ["convert", model, str(tmp_path / "x"), "--fp16-safe"], catch_exceptions=False)
