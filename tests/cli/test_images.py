"""`vae encode`, `decode`, `reconstruct`, `measure`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import read_json, write_foreign
from tests.presets import TINY
from vae.cli.common import raw_latents
from vae.config.model import AutoencoderConfig
from vae.data.pixels import from_array
from vae.data.transforms import center_crop, crop_to_multiple, to_model_range, to_uint8
from vae.errors import InputError
from vae.latents import scale_latents
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder
from vae.weights.latent_files import write_latents
from vae.weights.ldm import to_ldm
from vae.weights.model_card import MARK
from vae.weights.safetensors_io import read_index

COMMANDS = (
    "inspect",
    "convert",
    "export",
    "extract",
    "bake",
    "measure",
    "encode",
    "decode",
    "reconstruct",
    "prepare",
    "cache-latents",
    "compare",
)


def _difference(one: Path, other: Path) -> int:
    pictures = [np.asarray(Image.open(path)).astype(int) for path in (one, other)]
    return int(np.abs(pictures[0] - pictures[1]).max())


def _pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as photo:
        return from_array(photo.convert("RGB"))


def _squares(photos: Path) -> torch.Tensor:
    """The central 32 pixels of every photograph, as one batch."""
    files = [path for path in sorted(photos.rglob("*")) if path.is_file()]
    return torch.stack([to_model_range(center_crop(_pixels(path), 32)) for path in files])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(call, capsys, command):
    assert call(command, "--help") == 0
    assert f"Example: vae {command}" in capsys.readouterr().out


def test_help_names_every_command_and_the_exit_statuses(call, capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert "Exit status: 0 done; 2" in printed


def test_encoded_images_decode_to_what_the_model_reconstructs(call, model, photos, tmp_path):
    assert call("encode", model, photos, "--output", tmp_path / "latents") == 0
    assert call("decode", model, tmp_path / "latents", "--output", tmp_path / "out") == 0
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert names == ["a_png.png", "b_jpg.png", "sub/a_png.png"]
    autoencoder = load_autoencoder(model)
    with Image.open(tmp_path / "out" / "b_jpg.png") as decoded, torch.no_grad():
        images = to_model_range(crop_to_multiple(_pixels(photos / "b.jpg"), 2, "b.jpg"))[None]
        expected = to_uint8(autoencoder.decode(autoencoder.encode(images).mode()))[0]
        assert decoded.size == (36, 32)
        assert np.abs(np.asarray(decoded).astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1


def test_scaled_latents_are_scaled_and_come_back(call, model, photos, tmp_path):
    for name, extra in (("raw", ()), ("scaled", ("--scaled",))):
        assert call("encode", model, photos / "a.png", "--output", tmp_path / name, *extra) == 0
        assert call("decode", model, tmp_path / name, "--output", tmp_path / f"{name} out") == 0
    raw, scaled = (load_file(tmp_path / name / "a_png.latent") for name in ("raw", "scaled"))
    assert scaled.keys() == {"scaled_latents"}
    torch.testing.assert_close(
        scaled["scaled_latents"], scale_latents(raw["latent_tensor"], load_autoencoder(model).config)
    )
    pictures = [
        np.asarray(Image.open(tmp_path / f"{name} out" / "a_png.png")).astype(int) for name in ("raw", "scaled")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_samples_are_a_function_of_their_seed(call, model, photos, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert call("encode", model, photos / "a.png", "--sample", seed, "--output", tmp_path / name) == 0
    one, again, two = (load_file(tmp_path / name / "a_png.latent")["latent_tensor"] for name in ("one", "again", "two"))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_latent_files_are_comfyuis(call, model, photos, tmp_path):
    """Its LoadLatent reads `latent_tensor`, and divides by 0.18215 where `latent_format_version_0` is not there."""
    call("encode", model, photos / "a.png", "--output", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "a_png.latent")
    assert ours.keys() == {"latent_tensor", "latent_format_version_0"}
    assert ours["latent_tensor"].shape == (1, 3, 15, 20)
    (tmp_path / "old").mkdir()
    save_file({"latent_tensor": ours["latent_tensor"] * 0.18215}, tmp_path / "old" / "a_png.latent")
    for name in ("ours", "old"):
        assert call("decode", model, tmp_path / name, "--output", tmp_path / f"{name} out") == 0
    assert _difference(tmp_path / "ours out" / "a_png.png", tmp_path / "old out" / "a_png.png") <= 1


def test_reconstruct_writes_a_picture_for_each_image(call, model, photos, tmp_path):
    assert call("reconstruct", model, photos, "--output", tmp_path / "out", "--resolution", 32) == 0
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert names == ["a_png.png", "b_jpg.png", "sub/a_png.png"]


def test_measure_writes_the_factors_into_both_files_of_an_export(call, capsys, tiny, photos, tmp_path):
    autoencoder = AutoencoderKL(tiny).eval()
    export = tmp_path / "exports" / "step_0000001"
    folder = save_autoencoder(autoencoder, export / "diffusers")
    single = save_autoencoder(autoencoder, export / "run.vae.safetensors", "ldm")
    assert call("measure", tmp_path, photos, "--resolution", 32) == 0
    assert load_autoencoder(folder).config == tiny
    assert call("measure", tmp_path, photos, "--resolution", 32, "--write") == 0
    with torch.no_grad():
        images = [to_model_range(center_crop(_pixels(path), 32)) for path in sorted(photos.rglob("*.*"))]
        posterior = autoencoder.encode(torch.stack(images))
    expected = 1 / (posterior.mean.double().var(correction=0) + posterior.logvar.double().exp().mean()).sqrt().item()
    for path in (folder, single):
        found = read_autoencoder(path)
        assert found.config.scaling_factor == pytest.approx(expected, rel=1e-6)
        assert found.notes.latents["images"] == 3
        assert len(found.notes.latents["latents_std"]) == 3
    assert read_json(folder / "config.json")["scaling_factor"] == pytest.approx(expected, rel=1e-6)
    assert "scaling_factor" in capsys.readouterr().out


def test_factors_are_never_written_into_a_full_checkpoint(call, capsys, photos, tmp_path):
    config = AutoencoderConfig(block_out_channels=[32, 32])
    state = to_ldm(dict(AutoencoderKL(config).state_dict()), config)
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    full = unet | {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(full, tmp_path / "full.safetensors")
    before = (tmp_path / "full.safetensors").read_bytes()
    assert call("measure", tmp_path / "full.safetensors", photos, "--resolution", 32, "--write") == 2
    printed = capsys.readouterr()
    assert "not a safetensors file of its own" in printed.err
    assert "scaling_factor" not in printed.out
    assert (tmp_path / "full.safetensors").read_bytes() == before


def test_factors_per_channel_replace_the_global_one_and_are_never_added_to_it(call, model, photos):
    assert call("measure", model, photos, "--resolution", 32, "--write", "--per-channel") == 0
    config = load_autoencoder(model).config
    assert config.scaling_factor == 1.0
    assert config.shift_factor is None
    with torch.no_grad():
        images = [to_model_range(center_crop(_pixels(path), 32)) for path in sorted(photos.rglob("*.*"))]
        scaled = scale_latents(load_autoencoder(model).encode(torch.stack(images)).mode(), config)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Of SDXL, let us say, in a file that does not tell it: f8c4."""
    torch.manual_seed(3)
    config = AutoencoderConfig(block_out_channels=[32] * 4, layers_per_block=1, mid_block_add_attention=False)
    return write_foreign(AutoencoderKL(config), tmp_path / "foreign.safetensors")


def test_latents_of_a_file_that_does_not_tell_its_scale_tell_none(call, capsys, foreign, photos, tmp_path):
    """As a tiny decoder sees them they are 1.4 times too large with the factor of SD 1.x where it is SDXL's."""
    tiny, latents = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "tiny"), tmp_path / "latents"
    assert call("encode", foreign, photos / "a.png", "--output", latents) == 0
    assert "does not tell its scaling factor: none is written beside the latents" in capsys.readouterr().err
    (file,) = latents.glob("*.latent")
    assert "factor" not in json.dumps(read_index(file).metadata)
    assert call("decode", tiny, latents, "--output", tmp_path / "out") == 2
    assert "raw latents that do not tell their scale, expected --family with it" in capsys.readouterr().err
    told = raw_latents(file, TINY(), "sdxl")
    assert call("decode", foreign, latents, "--output", tmp_path / "out") == 0  # a decoder of its kind needs none
    assert call("encode", foreign, photos / "a.png", "--output", latents, "--family", "sdxl") == 0
    assert torch.equal(raw_latents(file, TINY(), None), told)


def test_scaled_latents_ask_for_the_scale_of_a_file_that_does_not_tell_it(call, capsys, foreign, photos, tmp_path):
    command = ("encode", foreign, photos / "a.png", "--output", tmp_path / "latents", "--scaled")
    assert call(*command) == 2
    assert "does not tell its scaling factor, expected --family with it, or raw latents" in capsys.readouterr().err
    assert call(*command, "--family", "sdxl") == 0


def test_scaled_latents_are_unscaled_by_what_their_file_states_and_not_by_the_reader(call, photos, tmp_path, tiny):
    """A tuned decoder, whose export states another factor, shows scaled latents of its base as it shows raw ones."""
    base = AutoencoderKL(tiny)
    maker, reader = (
        save_autoencoder(base_with(base, config), tmp_path / name)
        for name, config in {"maker": tiny, "reader": replace(tiny, scaling_factor=1.5, shift_factor=0.5)}.items()
    )
    for name, extra in (("raw", ()), ("scaled", ("--scaled",))):
        assert call("encode", maker, photos / "a.png", "--output", tmp_path / name, *extra) == 0
        assert call("decode", reader, tmp_path / name, "--output", tmp_path / f"{name} out") == 0
    assert _difference(tmp_path / "raw out" / "a_png.png", tmp_path / "scaled out" / "a_png.png") <= 1


def base_with(base: AutoencoderKL, config: AutoencoderConfig) -> AutoencoderKL:
    model = AutoencoderKL(config)
    model.load_state_dict(base.state_dict())
    return model


def test_scaled_latents_of_the_other_architecture_are_unscaled_by_the_readers_own(tmp_path):
    latents, path, kl = torch.randn(1, 4, 4, 4), tmp_path / "a.latent", AutoencoderConfig(scaling_factor=0.5)
    write_latents(path, latents, TINY(), scaled=True, drawn="mean")
    assert torch.equal(raw_latents(path, kl, None), latents / 0.5)
    with pytest.raises(InputError, match="a model that does not tell its scale, expected --family with them"):
        raw_latents(path, kl.assuming_its_scale(), None)
    early = {"scaled": True, "drawn": "mean", "shift_factor": None, "latents_mean": None, "latents_std": None}
    for factor, expected in ((1.0, latents / 0.5), (0.25, latents / 0.25)):  # before files told the architecture
        save_file({"scaled_latents": latents}, path, {"vae.latents": json.dumps(early | {"scaling_factor": factor})})
        assert torch.equal(raw_latents(path, kl, None), expected)


def test_a_factor_that_was_measured_is_not_called_assumed(call, foreign, photos):
    assert not read_autoencoder(foreign).scale_is_known
    assert call("measure", foreign, photos, "--resolution", 32, "--write") == 0
    found = read_autoencoder(foreign)
    assert found.scale_is_known
    assert "assumed" not in found.notes.latents
    assert found.config.scaling_factor == found.notes.latents["scaling_factor"]


def test_the_card_beside_an_exports_single_file_has_the_new_factor(call, photos, tmp_path):
    """diffusers has no folder for a decoder that pools."""
    export, model = tmp_path / "exports" / "step_0000001", AutoencoderTiny(TINY(mid_block_pool=True))
    single = save_autoencoder(model, export / "run.vae.safetensors", "taesd")
    (export / "README.md").write_text(f"{MARK}\n- scaling factor 1, shift none")
    assert call("measure", tmp_path, photos, "--resolution", 32, "--write") == 0
    factor = read_autoencoder(single).config.scaling_factor
    assert f"- scaling factor {factor:.6g}, shift none: measured" in (export / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reconstruct", "MODEL", "/nowhere.png"), "/nowhere.png: No such file or directory"),
        (("reconstruct", "MODEL", "PHOTO", "--resolution", "33"), "33x33 pixels, expected multiples of 2"),
        (("encode", "MODEL", "/nowhere.png"), "/nowhere.png: No such file or directory"),
        (("encode", "MODEL", "PHOTO", "PHOTO"), "two files are called a.png"),
        (("encode", "MODEL", "PHOTO", "--dtype", "int8"), "--dtype int8, expected one of"),
        (("encode", "MODEL", "PHOTO", "--device", "abacus"), "device='abacus' is not to be had"),
        (("decode", "MODEL", "PHOTO"), "a.png: damaged or not safetensors"),
        (("decode", "MODEL", "MODEL/diffusion_pytorch_model.safetensors"), "neither latent_tensor nor scaled_latents"),
        (("decode", "MODEL", "PHOTOS"), "nothing in it or below to read (looked for .latent)"),
        (("measure", "MODEL", "PHOTO", "--per-channel"), "--per-channel says what --write writes"),
    ],
)
def test_refused_input_is_one_line_and_status_two(call, capsys, model, photos, tmp_path, arguments, message):
    names = {"MODEL": model, "PHOTO": photos / "a.png", "PHOTOS": photos}
    given = [str(names.get(argument, argument)).replace("MODEL/", f"{model}/") for argument in arguments]
    assert call(*given, *(("--output", tmp_path / "out") if arguments[0] != "measure" else ())) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_latents_of_another_model_are_refused(call, capsys, model, photos, tmp_path):
    other = save_autoencoder(
        AutoencoderKL(AutoencoderConfig(block_out_channels=[8, 16], norm_num_groups=4)), tmp_path / "other"
    )
    call("encode", other, photos / "a.png", "--output", tmp_path / "latents")
    assert call("decode", model, tmp_path / "latents", "--output", tmp_path / "out") == 2
    assert "latents are (1, 4, 15, 20), expected (images, 3, height, width)" in capsys.readouterr().err
