"""`vae inspect`, `convert`, `export`, `extract`, `bake`."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import read_json
from tests.precision.test_precision import overflowing
from vae.config.model import AutoencoderConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.train import train
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder
from vae.weights.ldm import to_ldm
from vae.weights.safetensors_io import narrowed

PIXELS = ("--resolution", 32)
SD_SHAPED = AutoencoderConfig(block_out_channels=[32, 32])


def test_inspect_says_what_a_model_is(call, capsys, model):
    assert call("inspect", model) == 0
    printed = capsys.readouterr()
    assert "AutoencoderKL f2c3, of no known family" in printed.out
    lines = printed.out.splitlines()
    assert len(lines) <= 10
    assert lines[1] == "   verdict  sound, and loads in diffusers, kohya sd-scripts (folder)"
    assert "4 channels" not in printed.out
    assert "3 channels, scaling_factor 0.18215" in printed.out
    assert "live, float32" in printed.out
    assert "warning: only diffusers and kohya sd-scripts (folder) can load it" in printed.err


def test_inspect_says_everything_of_a_model_on_demand(call, capsys, model):
    assert call("inspect", model, "--verbose") == 0
    printed = capsys.readouterr().out
    assert "scaling_factor  0.18215" in printed
    assert "finite  yes" in printed
    assert "stored as  float32" in printed
    assert "mid_block_pool  False" in printed


def test_inspect_finds_a_network_that_is_not_safe_in_float16(call, capsys, tmp_path, perturbed, tiny):
    save_autoencoder(overflowing(perturbed(tiny)), tmp_path / "broken")
    assert call("inspect", tmp_path / "broken", "--audit", "photos", *PIXELS) == 0
    printed = capsys.readouterr().out
    assert "safe in float16: no, because the largest activation is" in printed
    assert "float16  -inf dB" in printed


def test_inspect_names_tensors_that_are_not_finite_and_ends_with_status_two(call, capsys, model):
    path = model / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"decoder.conv_in.bias": torch.full((16,), torch.nan)}, path)
    assert call("inspect", model) == 2
    printed = capsys.readouterr()
    assert "damaged: 1 tensors hold NaN or infinite values" in printed.out
    assert "decoder.conv_in.bias" in printed.err


def test_inspect_compares_with_a_base(call, capsys, model, tmp_path):
    state = load_file(model / "diffusion_pytorch_model.safetensors")
    tuned = load_autoencoder(model)
    tuned.load_state_dict(state | {"decoder.conv_out.bias": torch.ones(3)})
    save_autoencoder(tuned, tmp_path / "tuned")
    assert call("inspect", tmp_path / "tuned", "--base", model, *PIXELS) == 0
    assert "same latents: all" in capsys.readouterr().out


def test_inspect_compares_the_settings_of_encoders_too(call, capsys, model, tmp_path):
    other = load_autoencoder(model)
    other.config = replace(other.config, norm_num_groups=8)
    save_autoencoder(other, tmp_path / "other")
    assert call("inspect", tmp_path / "other", "--base", model, *PIXELS) == 0
    printed = "".join(capsys.readouterr())
    assert "identical" not in printed
    assert "norm_num_groups is 8, the base's is 4" in printed


def test_groups_that_are_assumed_are_said_beside_what_rests_on_them(call, capsys, tmp_path):
    single = tmp_path / "foreign.safetensors"
    state = to_ldm(dict(AutoencoderKL(SD_SHAPED).state_dict()), SD_SHAPED)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, single)
    assert call("convert", single, tmp_path / "out", "--base", single, *PIXELS) == 0
    printed = capsys.readouterr()
    assert f"bit for bit, if {single} has groups of 32, which is assumed" in printed.out
    assert "the file does not tell norm_num_groups: 32 is assumed; --config states it" in printed.err


def test_convert_compares_what_it_writes_with_the_base(call, capsys, model, tmp_path):
    target = tmp_path / "half.vae.safetensors"
    assert call("convert", model, target, "--dtype", "float16", "--base", model, *PIXELS) == 0
    claimed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("against"))
    assert call("inspect", target, "--base", model, *PIXELS) == 0
    assert claimed in capsys.readouterr().out
    assert "identical" not in claimed
    assert "nearly the same latents" in claimed


def test_convert_to_float16_refuses_what_that_cannot_hold_before_it_compares(call, capsys, model, tmp_path):
    large = load_autoencoder(model)
    with torch.no_grad():
        large.encoder.conv_in.weight.fill_(1e5)
    save_autoencoder(large, tmp_path / "large.safetensors", "ldm")
    arguments = ("--dtype", "float16", "--base", model, *PIXELS)
    assert call("convert", tmp_path / "large.safetensors", tmp_path / "half.safetensors", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "half.safetensors: encoder.conv_in.weight exceeds float16" in printed.err


def test_everything_that_writes_float16_says_what_that_takes_from_the_weights(call, capsys, tmp_path):
    model = AutoencoderKL(SD_SHAPED)
    with torch.no_grad():
        model.decoder.conv_in.weight[0, 0, 0] = torch.tensor([1e-9, 1e-6, 1.0])
    full, source = tmp_path / "full.safetensors", tmp_path / "m.vae.safetensors"
    save_autoencoder(model, source, "ldm")
    words = narrowed(model.state_dict(), torch.float16).words
    assert words is not None
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3).half()}, full)
    for arguments in (
        ("convert", source, tmp_path / "half.safetensors", "--dtype", "float16"),
        ("convert", source, tmp_path / "folder"),
        ("convert", source, tmp_path / "folder", "--dtype", "float16"),
        ("extract", source, tmp_path / "again.safetensors", "--dtype", "float16"),
        ("bake", source, full, tmp_path / "new.safetensors"),
    ):
        assert call(*arguments) == 0
        assert capsys.readouterr().out.count(words) == 1, arguments
    for arguments in (
        ("convert", source, tmp_path / "whole.safetensors"),
        ("convert", source, tmp_path / "brain.safetensors", "--dtype", "bfloat16"),
        ("convert", tmp_path / "half.safetensors", tmp_path / "half2.safetensors", "--dtype", "float16"),
    ):
        assert call(*arguments) == 0
        assert "weights" not in capsys.readouterr().out.replace("live weights", ""), arguments


def test_convert_goes_to_one_file_and_back(call, model, tmp_path):
    assert call("convert", model, tmp_path / "one.vae.safetensors") == 0
    assert call("convert", tmp_path / "one.vae.safetensors", tmp_path / "again") == 0
    states = [load_autoencoder(path).state_dict() for path in (model, tmp_path / "again")]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    assert read_json(tmp_path / "again" / "config.json") == read_json(model / "config.json")


def test_convert_repairs_float16_says_so_and_sets_force_upcast(call, capsys, tmp_path, perturbed, tiny):
    broken = overflowing(perturbed(tiny))
    save_autoencoder(broken, tmp_path / "broken")
    target = tmp_path / "fixed.vae.safetensors"
    assert call("convert", tmp_path / "broken", target, "--fp16-safe", "--dtype", "float16", *PIXELS) == 0
    printed = capsys.readouterr().out
    before, after = (line for line in printed.splitlines() if "safe in float16" in line)
    assert before.startswith("before: safe in float16: no")
    assert after.startswith("after:  safe in float16: yes")
    found = read_autoencoder(target)
    assert not found.config.force_upcast
    latents = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        exact = broken.decode(latents)
        in_half = found.build(torch.float16).decode(latents).float()
    assert in_half.isfinite().all()
    assert (in_half - exact).abs().max() < 0.05


def test_export_publishes_a_checkpoint_as_the_run_does_at_its_end(call, capsys, tiny_run):
    run = train(tiny_run)
    export = run / "exports" / "step_0000008"
    words = narrowed(load_autoencoder(run).state_dict(), torch.float16).words
    assert words is not None
    assert capsys.readouterr().out.count(words) == 1
    expected = {path.relative_to(export): path.read_bytes() for path in export.rglob("*") if path.is_file()}
    for path in export.rglob("*.safetensors"):
        path.unlink()
    assert call("export", run) == 0
    assert capsys.readouterr().out.count(words) == 1
    assert {path.relative_to(export): path.read_bytes() for path in export.rglob("*") if path.is_file()} == expected
    assert call("export", run, "--step", 4, "--live") == 0
    state = torch.load(run / "checkpoints" / "step_0000004.ckpt", weights_only=True)["state_dict"]
    live = read_autoencoder(run / "exports" / "live_step_0000004" / "diffusers")
    assert all(torch.equal(tensor, state[f"autoencoder.{name}"]) for name, tensor in live.state.items())
    assert live.notes.training["weights"] == "live"


def test_an_export_holds_no_path_of_the_machine_it_was_made_on(call, tiny_run, tmp_path):
    export = train(tiny_run) / "exports" / "step_0000008"
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in export.rglob("*") if path.is_file())
    notes = read_autoencoder(export / "diffusers").notes
    assert notes.training["updates"] == 8
    assert notes.training["precision"].startswith("safe in float16: yes")
    assert len(notes.latents["latents_std"]) == 3


def test_bake_and_extract_report_what_they_did(call, capsys, tmp_path):
    config = AutoencoderConfig(block_out_channels=[32, 32])
    model = AutoencoderKL(config)
    single = save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm")
    old = {f"first_stage_model.{n}": t.contiguous() for n, t in to_ldm(dict(model.state_dict()), config).items()}
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    save_file(unet | old, tmp_path / "full.safetensors")
    assert call("bake", single, tmp_path / "full.safetensors", tmp_path / "new.safetensors") == 0
    assert f"1 tensors copied, {len(old)} old ones" in capsys.readouterr().out
    assert call("extract", tmp_path / "new.safetensors", tmp_path / "out.vae.safetensors") == 0
    assert all(torch.equal(load_file(single)[n], t) for n, t in load_file(tmp_path / "out.vae.safetensors").items())


def test_an_ambiguous_file_converts_with_a_stated_architecture(call, capsys, tmp_path):
    config = AutoencoderConfig(block_out_channels=[32], use_quant_conv=False, use_post_quant_conv=False)
    state = to_ldm(dict(AutoencoderKL(config).state_dict()), config)
    save_file({n: t.contiguous() for n, t in state.items() if "quant_conv" not in n}, tmp_path / "bare.safetensors")
    assert call("convert", tmp_path / "bare.safetensors", tmp_path / "out") == 2
    assert "say which" in capsys.readouterr().err
    stated = save_autoencoder(AutoencoderKL(config), tmp_path / "stated")
    assert call("convert", tmp_path / "bare.safetensors", tmp_path / "out", "--config", stated / "config.json") == 0
    assert load_autoencoder(tmp_path / "out").config == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/nowhere"), "'/nowhere': no such file or folder"),
        (("convert", "MODEL", "x", "--dtype", "int8"), "--dtype int8, expected one of"),
        (("convert", "MODEL", "x.ckpt"), "x.ckpt: name it NAME.vae.safetensors for one file"),
        (("export", "MODEL"), "checkpoints: no checkpoint in it, expected the directory of a run"),
        (("bake", "MODEL", "nowhere.safetensors", "x.safetensors"), "nowhere.safetensors: no such file"),
        (("bake", "MODEL", "MODEL", "x.safetensors"), "model: a folder, not a file"),
        (("convert", "MODEL", "MODEL/config.json/x.safetensors"), "x.safetensors: cannot be written"),
        (("convert", "MODEL", "out", "--images", "nowhere"), "--images nowhere, expected --fp16-safe or --base"),
        (("convert", "MODEL", "out", "--family", "sdxl"), "--family sdxl, expected one of []"),
        (("bake", "MODEL", "MODEL/diffusion_pytorch_model.safetensors", "x.safetensors"), "an autoencoder by itself"),
        (("extract", "/nowhere.safetensors", "x"), "'/nowhere.safetensors': no such file or folder"),
    ],
)
def test_refused_input_is_one_line_and_status_two(call, capsys, model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [argument.replace("MODEL", str(model)) for argument in arguments]
    assert call(*given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
