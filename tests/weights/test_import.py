"""Pickles with foreign objects, averaged weights, folders and full checkpoints, made here from their description."""

import argparse
import json
import pathlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder, save_found
from vae.weights.describe import facts_of, title_of, warnings_of
from vae.weights.formats import find_autoencoder
from vae.weights.ldm import to_ldm
from vae.weights.loaded import WeightsFile
from vae.weights.pickle_io import read_pickle

State = dict[str, torch.Tensor]

UNET = "model.diffusion_model."
SD_SHAPED = AutoencoderConfig(block_out_channels=[32, 32, 64, 64], layers_per_block=2)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(SD_SHAPED)


@pytest.fixture(scope="module")
def ldm(model: AutoencoderKL) -> State:
    return {name: tensor.contiguous() for name, tensor in to_ldm(dict(model.state_dict()), SD_SHAPED).items()}


def _shadow(state: State) -> State:
    """LitEma's averages: the names without their dots, and two counters."""
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1.0 for name, tensor in state.items()}
    return averages | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


class _Callback:
    """Some class of the program that saved the file."""


PICKLES: dict[str, Callable[[State], object]] = {
    "flat": dict,
    "nested": lambda s: {"state_dict": s, "epoch": 3, "global_step": 1000},
    "parameters": lambda s: {"state_dict": {name: torch.nn.Parameter(t) for name, t in s.items()}},
    "callbacks as keys": lambda s: {"state_dict": s, "callbacks": {_Callback: {"best": 1.0}}},
    "namespaces, paths and numpy scalars": lambda s: {
        "state_dict": s,
        "hyper_parameters": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/tmp"), best=np.float64(0.5)),
    },
}


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES.keys())
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_with_foreign_objects_import_bit_for_bit(tmp_path, model, ldm, make, zipped):
    torch.save(make(ldm), tmp_path / "vae.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_autoencoder(tmp_path / "vae.ckpt")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "the autoencoder"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tied_tensors_are_read_each_with_data_of_its_own(tmp_path, ldm, zipped, whole):
    """All of one shape are one in this file, which is so a tenth of the network."""
    of_shape = {tensor.shape: tensor for tensor in ldm.values()}
    tied = {name: of_shape[tensor.shape] for name, tensor in ldm.items()}
    torch.save({"state_dict": tied}, tmp_path / "tied.ckpt", _use_new_zipfile_serialization=zipped)
    assert sum(tensor.nbytes for tensor in tied.values()) > 5 * (tmp_path / "tied.ckpt").stat().st_size
    state = read_pickle(tmp_path / "tied.ckpt", whole=whole)
    assert state.keys() == tied.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tied.items())
    assert whole or len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_the_averages_are_taken_when_asked_for_and_only_when_complete(tmp_path, model, ldm):
    save_file(ldm | _shadow(ldm), tmp_path / "both.safetensors")
    found = read_autoencoder(tmp_path / "both.safetensors", ema=True)
    assert found.weights == "EMA"
    assert all(torch.equal(found.state[name], tensor + 1.0) for name, tensor in model.state_dict().items())
    shadow = _shadow(ldm)
    del shadow["model_ema.quant_convbias"]
    save_file(ldm | shadow, tmp_path / "partly.safetensors")
    with pytest.raises(WeightsError, match=r"1 EMA weights missing \(first \['quant_conv.bias'\]\)"):
        read_autoencoder(tmp_path / "partly.safetensors", ema=True)


BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "FLUX.2": (lambda s: s | {"bn.running_mean": torch.zeros(128)}, "a FLUX.2 autoencoder"),
    "not finite": (
        lambda s: s | {"quant_conv.bias": torch.full((8,), torch.inf)},
        r"1 tensors hold NaN or infinite values",
    ),
    "something else": (lambda s: {"layer.weight": torch.zeros(2)}, "are not a KL autoencoder's"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_damaged_and_foreign_files_are_refused_with_the_reason(tmp_path, ldm, make, message):
    save_file(make(ldm), tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=message) as error:
        load_autoencoder(tmp_path / "vae.safetensors")
    assert str(tmp_path / "vae.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("keys", "family", "scaling"),
    [
        (["cond_stage_model.model.weight"], "sd", 0.18215),
        (["conditioner.embedders.0.transformer.weight", "conditioner.embedders.1.model.weight"], "sdxl", 0.13025),
        (["conditioner.embedders.0.model.weight", f"{UNET}label_emb.0.0.weight"], "sdxl", 0.13025),  # the refiner
        (["conditioner.embedders.0.model.weight", f"{UNET}input_blocks.0.0.weight"], "sd", 0.18215),  # SD 2 of sgm
        (["cond_stage_model.model.weight", f"{UNET}label_emb.0.0.weight"], "sd", 0.18215),  # SD 2 unCLIP
        (["low_scale_model.betas", "cond_stage_model.model.weight"], None, 0.18215),  # with another autoencoder
        ([f"{UNET}joint_blocks.0.weight"], None, 0.18215),  # the same: SD3 has 16 channels
        ([], None, 0.18215),
    ],
)
def test_a_full_checkpoint_tells_its_family_and_scale(tmp_path, ldm, keys, family, scaling):
    state = {f"first_stage_model.{name}": tensor for name, tensor in ldm.items()}
    save_file(state | {key: torch.zeros(1) for key in keys}, tmp_path / "full.safetensors")
    found = read_autoencoder(tmp_path / "full.safetensors")
    assert (found.family, found.config.scaling_factor) == (family, scaling)


@pytest.mark.parametrize(
    "keys",
    [
        ["low_scale_model.betas", "cond_stage_model.model.weight"],
        ["cond_stage_model.model.weight", f"{UNET}label_emb.weight"],
        ["cond_stage_model.model.weight"],
        [f"{UNET}input_blocks.0.0.weight"],
    ],
)
def test_an_x4_upscaler_has_its_own_scale_whatever_else_its_checkpoint_looks_like(keys):
    config = AutoencoderConfig(block_out_channels=[128, 256, 512])
    with torch.device("meta"):
        ldm = to_ldm(dict(AutoencoderKL(config).state_dict()), config)
        state = {f"first_stage_model.{name}": tensor for name, tensor in ldm.items()}
        found = find_autoencoder(WeightsFile(Path("x4.ckpt"), state | {key: torch.zeros(1) for key in keys}), None)
    assert (found.family, found.config.scaling_factor, found.scale_is_known) == ("x4", 0.08333, True)
    assert title_of(found) == "AutoencoderKL f4c4, of the x4 upscaler checkpoint it is in"


def test_the_number_of_groups_is_known_only_where_something_tells_it(tmp_path, model, ldm):
    save_file(ldm, tmp_path / "foreign.safetensors")
    found = read_autoencoder(tmp_path / "foreign.safetensors")
    assert (found.config.norm_num_groups, found.groups_are_known) == (32, False)
    assert "read from the tensors, 32 groups are assumed" in facts_of(found)["configuration"]
    assert "the file does not tell norm_num_groups: 32 is assumed; --config states it" in warnings_of(found)
    stated = read_autoencoder(tmp_path / "foreign.safetensors", config=replace(SD_SHAPED, norm_num_groups=16))
    assert stated.groups_are_known
    ours = read_autoencoder(save_autoencoder(model, tmp_path / "ours.safetensors", "ldm"))
    assert ours.groups_are_known
    assert facts_of(ours)["configuration"] == "stated"


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_groups_that_were_assumed_are_never_written_as_known(tmp_path, ldm, name):
    save_file(ldm, tmp_path / "foreign.safetensors")
    save_found(read_autoencoder(tmp_path / "foreign.safetensors"), tmp_path / name)
    again = read_autoencoder(tmp_path / name)
    assert not again.groups_are_known
    assert again.notes.architecture["assumed"].startswith("norm_num_groups")
    assert facts_of(again)["configuration"] == "stated, 32 groups are assumed"
    if name == "folder":
        assert "32 groups, which is assumed" in (tmp_path / name / "README.md").read_text()
    told = read_autoencoder(tmp_path / name, config=replace(SD_SHAPED, norm_num_groups=16))
    save_found(told, tmp_path / "told")
    assert read_autoencoder(tmp_path / "told").groups_are_known
    assert read_autoencoder(tmp_path / "told").config.norm_num_groups == 16


@pytest.mark.parametrize(("widths", "known"), [([128, 256, 512, 512], True), ([32, 32, 64, 64], False)])
def test_a_family_tells_the_groups_of_its_own_network_alone(widths, known):
    config = AutoencoderConfig(block_out_channels=widths)
    with torch.device("meta"):
        ldm = to_ldm(dict(AutoencoderKL(config).state_dict()), config)
    full = {f"first_stage_model.{name}": t for name, t in ldm.items()} | {"cond_stage_model.weight": torch.zeros(1)}
    assert find_autoencoder(WeightsFile(Path("sd.ckpt"), full), None).groups_are_known == known
    alone = find_autoencoder(WeightsFile(Path("vae.safetensors"), ldm), None)
    assert not alone.groups_are_known
    assert alone.of_family("sd").groups_are_known == known


def test_sixteen_channels_without_quant_convolutions_need_no_configuration(tmp_path):
    config = AutoencoderConfig(
        latent_channels=16, block_out_channels=[32, 64], use_quant_conv=False, use_post_quant_conv=False
    )
    model = AutoencoderKL(config)
    save_file({n: t.contiguous() for n, t in to_ldm(dict(model.state_dict()), config).items()}, tmp_path / "ae.sft")
    assert read_autoencoder(tmp_path / "ae.sft").config.shift_factor == 0.1159


def test_folders_with_half_precision_pickled_or_sharded_weights_load(tmp_path, model):
    save_autoencoder(model, tmp_path, dtype=torch.float16)
    plain = tmp_path / "diffusion_pytorch_model.safetensors"
    plain.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    expected = {name: tensor.half() for name, tensor in model.state_dict().items()}

    def loads() -> bool:
        found = read_autoencoder(tmp_path).state
        return all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert loads()
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save(expected, tmp_path / "diffusion_pytorch_model.bin")
    assert loads()
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    names = sorted(expected)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: expected[name] for name in inside}, tmp_path / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert loads()
