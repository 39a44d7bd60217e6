"""Runs whose autoencoder is a tiny one."""

import hashlib
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Authority
from safetensors.torch import load_file

from tests.conftest import read_json
from tests.presets import TINY
from tests.training.test_train import _columns
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.sources import Photos
from vae.errors import InputError
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.training.export import export_checkpoint, record_origin
from vae.training.initialise import initial_state
from vae.training.manifest import newest_whole
from vae.training.train import train
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder
from vae.weights.load import find_export


@pytest.fixture
def short(tiny_run: TrainConfig) -> TrainConfig:
    """Two updates, the adversary awake in the second."""
    loss = replace(tiny_run.loss, discriminator_start=0, adversarial_start=1, adversarial_ramp=0)
    return replace(tiny_run, model=TINY(), loss=loss, updates=2, validate_every=2)


def test_a_run_steps_without_a_kl_term_and_diffusers_loads_what_it_made(short, capsys):
    run = train(replace(short, gradient_checkpointing=True))
    columns = _columns(run)
    assert {"train/pixel", "train/adversarial", "val/psnr"} <= set(columns)
    assert not [name for name in columns if "kl" in name]
    folder = find_export(run)
    ours, images = load_autoencoder(folder), torch.rand(1, 3, 32, 32) * 2 - 1
    theirs, report = cast(Any, Authority).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        latents = ours.encode(images).mode()
        torch.testing.assert_close(theirs.encode(images).latents, latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.decode(latents).sample, ours.decode(latents), atol=1e-5, rtol=0)
    (single,) = folder.parent.glob("*.safetensors")
    found = read_autoencoder(single)
    assert (found.layout, found.config.scaling_factor) == ("taesd", 1.0)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in found.state.items())
    assert "kl" not in found.notes.training["loss"]["weights"]
    assert found.family is None
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"vae convert {run} NAME.safetensors --family sd, or sdxl" in said


def test_a_decoder_that_pools_is_fine_tuned_into_one_file(tmp_path, short):
    base = AutoencoderTiny(TINY(mid_block_pool=True))
    init = save_autoencoder(base, tmp_path / "base_decoder.safetensors", "taesd")
    run = train(replace(short, init=str(init), frozen=["encoder"], model=AutoencoderConfig()))
    made = find_export(run)
    assert {path.name for path in made.parent.iterdir()} == {made.name, "README.md", "best.json"}
    card = (made.parent / "README.md").read_text()
    for half in ("decoder", "encoder"):
        content = (tmp_path / f"base_{half}.safetensors").read_bytes()
        assert f"`base_{half}.safetensors`, SHA-256 `{hashlib.sha256(content).hexdigest()}`" in card
    after, before = load_autoencoder(made).state_dict(), base.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_fine_tuned_ones_single_files_tell_the_family_of_the_published_one(tmp_path, short, capsys):
    save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "taesdxl_decoder.safetensors", "taesd")
    begun = replace(short, init=str(tmp_path / "taesdxl_encoder.safetensors"), model=AutoencoderConfig())
    run = train(replace(begun, keep_best="psnr"))
    assert "--family" not in "".join(capsys.readouterr())
    export_checkpoint(run, newest_whole(run / "checkpoints")[0], torch.device("cpu"), live=True)
    singles = sorted((run / "exports").glob("*/*.safetensors"))
    assert [path.parent.name for path in singles] == ["best", "live_step_0000002", "step_0000002"]
    assert [load_file(path)["vae_scale"].item() for path in singles] == [pytest.approx(0.13025)] * 3
    assert read_autoencoder(find_export(run)).family == "sdxl"


def test_latents_of_a_teacher_are_not_of_inits_family(tmp_path, short):
    init = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "taesd_decoder.safetensors", "taesd")
    start = initial_state(
        replace(short, init=str(init), teacher=str(init), model=AutoencoderConfig()), tmp_path / "run"
    )
    images = Photos(["coins.png"])
    record_origin(start, tmp_path, (images, images), resumed=False)
    origin = read_json(tmp_path / "origin.json")
    assert "family" not in origin
    assert origin["teacher"]["other_half"]["file"] == "taesd_encoder.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": 1e-3}, r"loss.weights.kl=0.001 with model.architecture=tiny, expected 0: its posteriors have no width"),
        ({"kl_warmup": 10}, "loss.kl_warmup=10 with model.architecture=tiny, expected 0"),
    ],
)
def test_a_kl_term_that_cannot_be_is_refused(short, change, message):
    weights = replace(short.loss.weights, kl=change.get("kl", short.loss.weights.kl))
    loss = replace(short.loss, weights=weights, kl_warmup=change.get("kl_warmup", 0))
    with pytest.raises(InputError, match=message):
        replace(short, loss=loss)
