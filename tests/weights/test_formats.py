"""Published layouts: exact round trips, and diffusers as the authority that loads what we write."""

import json
import stat
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from safetensors.torch import load_file, save_file

from tests.presets import PRESETS, preset
from vae.files import WeightsError, replacing
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.formats import from_diffusers_config, to_diffusers_config
from vae.weights.ldm import from_ldm, ldm_names, to_ldm
from vae.weights.safetensors_io import narrowed, pieces_of


@pytest.mark.parametrize("name", PRESETS)
def test_ldm_names_are_a_bijection_for_every_preset(name):
    with torch.device("meta"):
        state = AutoencoderKL(preset(name)).state_dict()
    there = to_ldm(state, preset(name))
    assert len(there) == len(state)
    assert not any(
        "." + part + "." in key for key in there for part in ("resnets", "mid_block", "to_q", "conv_shortcut")
    )
    back = from_ldm(there, preset(name))
    assert {key: tensor.shape for key, tensor in back.items()} == {key: t.shape for key, t in state.items()}


def test_the_sd_single_file_has_the_names_that_web_uis_demand():
    """Read off the released SD 1.5 tree: `up` counted from the image side, projections as 1x1 convolutions."""
    with torch.device("meta"):
        state = to_ldm(AutoencoderKL(preset("sd")).state_dict(), preset("sd"))
    assert len(state) == 248
    expected = {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert "encoder.down.3.downsample.conv.weight" not in state
    assert "decoder.up.0.upsample.conv.weight" not in state


def test_the_tensors_diffusers_saves_are_loaded_back(tmp_path, tiny):
    theirs = cast(Any, Authority.from_config(to_diffusers_config(tiny)))
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert ours.config == tiny
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_half_precision_files_are_half_as_large_and_load_as_float32(tmp_path, tiny):
    model = AutoencoderKL(tiny)
    path = save_autoencoder(model, tmp_path / "half.safetensors", "ldm", torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert load_autoencoder(path).decoder.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_in_diffusers_whether_the_variant_is_asked_for_or_not(tmp_path, tiny, variant, dtype):
    model = AutoencoderKL(tiny)
    save_autoencoder(model, tmp_path, dtype=dtype)
    theirs, report = cast(Any, Authority).from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not any(report.values())
    stored = torch.float16 if variant else dtype
    assert all(torch.equal(theirs.state_dict()[n], t.to(stored).float()) for n, t in model.state_dict().items())


def test_weights_beyond_float16_are_refused_in_it_and_leave_the_folder_without_the_variant(tmp_path, tiny):
    model = AutoencoderKL(tiny)
    save_autoencoder(model, tmp_path / "folder")
    with torch.no_grad():
        model.decoder.conv_in.weight[0] = 1e5
    with pytest.raises(WeightsError, match=r"decoder.conv_in.weight exceeds float16; write bfloat16 or float32"):
        save_autoencoder(model, tmp_path / "m.safetensors", "ldm", torch.float16)
    with pytest.warns(UserWarning, match="no float16 variant"):
        save_autoencoder(model, tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert (load_autoencoder(tmp_path / "folder").decoder.conv_in.weight[0] == 1e5).all()


def test_weights_that_float16_takes_to_zero_or_keeps_with_fewer_digits_are_counted():
    values = torch.tensor([0.0, 1e-9, -1e-9, 2.0**-25, 3e-8, 1e-5, -6e-5, 2.0**-20, 7e-5, 1.0])
    found = narrowed({"a.weight": values, "b.bias": torch.ones(2)}, torch.float16)
    assert (found.total, found.zero, found.fewer) == (12, 3, 3)
    assert found.words == "float16: of 12 weights 3 became zero and 3 keep fewer digits, being below 6.1e-05"
    for exact in (torch.bfloat16, torch.float32):
        assert narrowed({"a.weight": values}, exact).words is None
    for stored, is_exact in {torch.float16: True, torch.float8_e5m2: True, torch.bfloat16: False}.items():
        assert (narrowed({"a.weight": values.to(stored)}, torch.float16).words is None) == is_exact


def test_counts_of_what_float16_takes_are_numpys(perturbed, tiny):
    state = {name: tensor.double() * 1e-5 for name, tensor in perturbed(tiny).state_dict().items()}
    every = np.concatenate([tensor.numpy().ravel() for tensor in state.values()])
    cast = every.astype(np.float16)
    zero = (cast == 0) & (every != 0)
    fewer = (np.abs(every) < np.finfo(np.float16).tiny) & (cast.astype(np.float64) != every) & ~zero
    found = narrowed(state, torch.float16)
    assert (found.total, found.zero, found.fewer) == (every.size, zero.sum(), fewer.sum())
    assert found.zero > 0 < found.fewer


@pytest.mark.parametrize("name", ["folder", "m.safetensors"])
def test_a_file_in_float16_whose_weights_vanish_is_written_with_a_warning(tmp_path, tiny, name):
    model = AutoencoderKL(tiny)
    with torch.no_grad():
        for weight in model.decoder.mid_block.parameters():
            weight.mul_(1e-9)
    layout = "ldm" if "." in name else "diffusers"
    with pytest.warns(UserWarning, match=r"float16: of [\d,]+ weights [\d,]+ became zero"):
        save_autoencoder(model, tmp_path / name, layout, torch.float16)


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 3.4e38), (torch.float32, 1e39), (torch.float16, 7e4)])
def test_no_type_is_written_that_makes_a_weight_infinite(tmp_path, tiny, dtype, value):
    state = {name: tensor.double() for name, tensor in AutoencoderKL(tiny).state_dict().items()}
    state["decoder.conv_in.bias"][0] = value
    with pytest.raises(WeightsError, match=f"decoder.conv_in.bias exceeds {str(dtype).removeprefix('torch.')}"):
        pieces_of(tmp_path / "m.safetensors", state, dtype)


def test_exports_may_be_read_by_other_users(tmp_path, tiny):
    path = save_autoencoder(AutoencoderKL(tiny), tmp_path / "shared.safetensors", "ldm")
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRGRP


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(WeightsError, match=r"cannot be written \(disk full\)"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _damage_keys(path):
    state = load_file(path)
    del state["decoder.conv_in.bias"]
    save_file(state | {"extra.weight": torch.zeros(1)}, path)


def _damage_shape(path):
    save_file(load_file(path) | {"decoder.conv_in.bias": torch.zeros(5)}, path)


def _damage_values(path):
    save_file(load_file(path) | {"decoder.conv_in.bias": torch.full((16,), torch.nan)}, path)


def _remove_weights(path):
    for file in path.parent.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _damage_keys,
            r"1 keys missing \(first \['decoder.conv_in.bias'\]\) and 1 unknown \(first \['extra",
        ),
        (_damage_shape, r"decoder.conv_in.bias is \(5,\), expected \(16,\)"),
        (_damage_values, r"1 tensors hold NaN or infinite values \(first \['decoder.conv_in.bias"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or not safetensors"),
        (lambda path: path.write_text("not a model"), "damaged or not safetensors"),
        (_remove_weights, "no such file"),
    ],
)
def test_unusable_weights_are_refused_with_file_and_reason(tmp_path, tiny, damage, message):
    save_autoencoder(AutoencoderKL(tiny), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    damage(path)
    with pytest.raises(WeightsError, match=message) as error:
        load_autoencoder(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "another kind of model"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"down_block_types": ["CrossAttnDownBlock2D"]}, "not supported"),
        ({"block_out_channels": [7]}, "block_out_channels"),
    ],
)
def test_foreign_configurations_are_refused(tmp_path, tiny, change, message):
    with pytest.raises(WeightsError, match=message):
        from_diffusers_config(to_diffusers_config(tiny) | change, tmp_path / "config.json")


def test_the_configuration_survives_its_trip_through_json(tmp_path, tiny):
    values = json.loads(json.dumps(to_diffusers_config(tiny)))
    assert from_diffusers_config(values, tmp_path) == tiny


def test_every_name_of_the_table_is_used_once():
    names = ldm_names(preset("kl_f16"))
    assert len(set(names.values())) == len(names)
