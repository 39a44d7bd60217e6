"""Hostile folders: an index or a configuration that no program wrote in good faith is refused in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.load import STEM

PLAIN, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
HUGE = 10**400  # an integer in JSON, and no float
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path: Path, tiny: AutoencoderConfig) -> Path:
    return save_autoencoder(AutoencoderKL(tiny), tmp_path / "folder")


def _assert_refused(folder: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_autoencoder(folder)
    message = str(error.value)
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 1_000


SHARDS = {
    "above the folder": "../model.safetensors",
    "anywhere": "/etc/passwd",
    "the folder": "",
    "the folder above": "..",
    "longer than a name may be": "x" * 300,
    "with a NUL": "a\0b",
    "with a terminal's control codes": "\x1b[2J\r",
    "with half a character": "\ud800",
    "the index itself": INDEX,
    "the configuration": "config.json",
    "a pipe that nobody writes to": "pipe",
    "not there": "model-00001-of-00002.safetensors",
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
def test_shards_that_are_no_weights_of_this_folder_are_refused(folder, shard):
    state = load_file(folder / PLAIN)
    (folder / PLAIN).unlink()
    os.mkfifo(folder / "pipe")
    save_file(state, folder.parent / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, shard)}))
    _assert_refused(folder)


TEXTS = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "not JSON": b'{"weight_map": {',
    "a mark before it": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"weight_map": {"\xff": "a"}, "_class_name": "\xff"}',
    "lists without end": f'{{"weight_map": {DEEP}, "_class_name": {DEEP}}}'.encode(),
    "too many digits": b'{"weight_map": ' + b"9" * 5_000 + b"}",
    "larger than two million bytes": json.dumps({"weight_map": {"a" * 2_000_000: "b"}}).encode(),
    "no map": b'{"metadata": {}}',
    "a map that is a list": b'{"weight_map": ["a"], "_class_name": ["a"]}',
    "a map of numbers": b'{"weight_map": {"a": 1}, "_class_name": 1}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_an_index_or_a_configuration_that_is_neither_is_refused(folder, name, text):
    if name == INDEX:
        (folder / PLAIN).unlink()
    (folder / name).write_bytes(text)
    _assert_refused(folder)


CHANGES: dict[str, dict[str, Any]] = {
    "another class": {"_class_name": "AutoencoderKLWan"},
    "a class that is a list": {"_class_name": ["AutoencoderKL"]},
    "a class of endless name": {"_class_name": "A" * 500_000},
    "an activation that is an object": {"act_fn": {}},
    "blocks that are text": {"down_block_types": "DownEncoderBlock2D"},
    "blocks that are objects": {"down_block_types": [{"_target_": "os.system"}]},
    "more blocks than widths": {"down_block_types": ["AttnDownEncoderBlock2D"] * 50},
    "widths of nothing": {"block_out_channels": []},
    "widths that are null": {"block_out_channels": None},
    "widths that are text": {"block_out_channels": "8"},
    "a million widths": {"block_out_channels": [0] * 300_000},
    "negative widths": {"block_out_channels": [-8, -16]},
    "levels of ours": {"attention_levels": ""},
    "groups that are true": {"norm_num_groups": True},
    "layers of zero": {"layers_per_block": 0},
    "a switch that is a number": {"use_quant_conv": 1},
    "a scale of zero": {"scaling_factor": 0},
    "a scale that is infinite": {"scaling_factor": float("inf")},
    "a scale beyond any float": {"scaling_factor": HUGE},
    "a shift beyond any float": {"shift_factor": -HUGE},
    "too few means": {"latents_mean": [0.0]},
    "means beyond any float": {"latents_mean": [HUGE] * 3},
    "deviations that are text": {"latents_std": ["1", "1", "1"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_configuration_of_wrong_values_is_refused(folder, change):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | change))
    _assert_refused(folder)


@pytest.mark.parametrize("name", ["config.json", PLAIN])
def test_a_folder_or_nothing_where_a_file_should_be_is_refused(folder, name):
    for weights in folder.glob("*.fp16.safetensors"):
        weights.unlink()
    (folder / name).unlink()
    _assert_refused(folder)
    (folder / name).mkdir()
    _assert_refused(folder)


def test_no_code_of_a_folder_is_imported(folder):
    sentinel = folder / "executed"
    for name in ("evil.py", "__init__.py", "modeling_vae.py"):
        (folder / name).write_text(f"open({str(sentinel)!r}, 'w').close()")
    described = json.loads((folder / "config.json").read_text())
    hostile = {"auto_map": {"AutoModel": "evil.Evil"}, "_target_": "evil.Evil", "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(described | hostile))
    load_autoencoder(folder)
    assert not sentinel.exists()
