"""Whole runs on the embedded photographs, a few updates long."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import read_json, without_adversary
from vae.config.data import DataConfig
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.manifest import newest_whole
from vae.training.module import AutoencoderModule
from vae.training.train import train
from vae.weights import load_autoencoder

ROOT = Path(__file__).resolve().parent.parent.parent


def _checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(newest_whole(folder / "checkpoints")[0], weights_only=True)


def _columns(folder: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def _same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@pytest.fixture
def finished(tiny_run: TrainConfig) -> Path:
    return train(tiny_run)


def test_a_run_leaves_its_configuration_checkpoints_exports_pictures_and_metrics(finished, tiny_run):
    saved = read_json(finished / "config.json")
    assert saved["threads"] >= 1
    assert saved | {"threads": None} == asdict(tiny_run)
    checkpoints = {path.name for path in (finished / "checkpoints").iterdir()}
    assert checkpoints == {"step_0000004.ckpt", "step_0000008.ckpt", "SHA256SUMS"}
    assert _checkpoint(finished)["global_step"] == 8
    pictures = sorted(path.name for path in (finished / "reconstructions").iterdir())
    assert pictures == ["step_0000000.png", "step_0000004.png", "step_0000008.png"]
    with Image.open(finished / "reconstructions" / "step_0000008.png") as sheet:
        assert sheet.width > sheet.height > 300
    columns = _columns(finished)
    for name in ("train/pixel", "train/kl", "train/adversarial", "train/discriminator", "train/adaptive_weight"):
        assert columns[name], name
    assert {"val/psnr", "val/ssim", "val/latent_std"} <= columns.keys()


def test_each_term_is_logged_from_the_update_it_starts_at(finished):
    columns = _columns(finished)
    assert len(columns["train/pixel"]) == 8
    assert len(columns["train/discriminator"]) == 6
    assert len(columns["train/adversarial"]) == 4


def test_the_export_is_the_average_of_the_weights_in_both_layouts(finished):
    export = finished / "exports" / "step_0000008"
    folder, single = load_autoencoder(export / "diffusers"), load_autoencoder(export / "run.vae.safetensors")
    state = _checkpoint(finished)["state_dict"]
    average = {name.removeprefix("ema_model."): t for name, t in state.items() if name.startswith("ema_model.")}
    assert _same(folder.state_dict(), average)
    assert _same(single.state_dict(), average)
    current = {name.removeprefix("autoencoder."): t for name, t in state.items() if name.startswith("autoencoder.")}
    assert not _same(average, current)


def test_the_export_carries_the_measured_scaling_factor(finished):
    config = load_autoencoder(finished / "exports" / "step_0000008" / "diffusers").config
    assert config.scaling_factor == pytest.approx(1 / _columns(finished)["val/latent_std"][-1], rel=1e-5)
    assert config.sample_size == 32


def test_the_checkpoint_holds_no_frozen_network(finished):
    parts = {name.split(".")[0] for name in _checkpoint(finished)["state_dict"]}
    assert parts == {"autoencoder", "ema_model", "discriminator", "adversarial_loss"}


def test_a_second_run_with_the_same_seed_gives_the_same_bits(finished, tiny_run):
    again = train(replace(tiny_run, name="again"))
    assert _same(_checkpoint(finished)["state_dict"], _checkpoint(again)["state_dict"])
    other = train(replace(tiny_run, name="other", seed=1))
    assert not _same(_checkpoint(finished)["state_dict"], _checkpoint(other)["state_dict"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cut_in_the_middle_resumes_to_the_same_bits(tiny_run, accumulate):
    config = replace(tiny_run, trainer=tiny_run.trainer | {"accumulate_grad_batches": accumulate})
    whole = train(config)
    cut = train(replace(config, name="cut"))
    (cut / "checkpoints" / "step_0000008.ckpt").unlink()
    resumed = train(replace(config, name="cut", resume=str(cut)))
    assert _checkpoint(resumed)["global_step"] == 8
    assert _same(_checkpoint(whole)["state_dict"], _checkpoint(resumed)["state_dict"])


def test_the_sleeping_discriminator_is_left_exactly_as_it_was(tiny_run):
    asleep = replace(tiny_run.loss, discriminator_start=100, adversarial_start=100)
    config = replace(tiny_run, loss=asleep)
    torch.manual_seed(0)
    folder = train(config)
    state = _checkpoint(folder)
    moments = state["optimizer_states"][0]["state"]
    autoencoder = len(list(AutoencoderModule(config).autoencoder.parameters()))
    assert sorted(moments) == list(range(autoencoder))


def test_a_warming_discriminator_leaves_the_autoencoder_untouched(tiny_run):
    """Until the adversarial term starts, the autoencoder learns the same with and without a discriminator beside it."""
    warming = replace(tiny_run.loss, discriminator_start=1, adversarial_start=100)
    states = []
    for name, config in (
        ("warming", replace(tiny_run, loss=warming)),
        ("asleep", replace(tiny_run, loss=replace(warming, discriminator_start=100))),
    ):
        state = _checkpoint(train(replace(config, name=name)))["state_dict"]
        states.append({key: tensor for key, tensor in state.items() if key.startswith("autoencoder.")})
    assert _same(*states)


def test_without_an_adversarial_weight_there_is_no_discriminator(tiny_run):
    folder = train(without_adversary(tiny_run))
    assert not any(name.startswith("discriminator") for name in _checkpoint(folder)["state_dict"])


Seen = Callable[[Tensor, Tensor], bool]  # the input of the decoder's last layer, and its weights
SWITCHES: dict[str, tuple[dict[str, Any], Seen]] = {
    "bf16-mixed": ({"trainer": {"precision": "bf16-mixed"}}, lambda x, _: x.dtype == torch.bfloat16),
    "channels_last": ({"channels_last": True}, lambda _, w: w.is_contiguous(memory_format=torch.channels_last)),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, lambda x, _: x.dtype == torch.float32),
}


@pytest.mark.parametrize(("change", "is_effective"), SWITCHES.values(), ids=SWITCHES.keys())
def test_the_switches_take_effect_and_train_to_the_end(tiny_run, monkeypatch, change, is_effective):
    seen: list[bool] = []
    recomputed: list[bool] = []
    original = AutoencoderKL.decode_features

    def watched(self: AutoencoderKL, latents: Tensor) -> Tensor:
        features = original(self, latents)
        if torch.is_grad_enabled():
            seen.append(is_effective(features, self.decoder.conv_out.weight))
            recomputed.append(self.decoder.gradient_checkpointing)
        return features

    monkeypatch.setattr(AutoencoderKL, "decode_features", watched)
    folder = train(replace(tiny_run, **(change | {"trainer": tiny_run.trainer | change.get("trainer", {})})))
    assert seen == [True] * 8
    assert recomputed == [change.get("gradient_checkpointing", False)] * 8
    for path in (folder / "exports").rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
        stored = torch.float16 if ".fp16." in path.name else torch.float32
        assert {tensor.dtype for tensor in load_file(path).values()} == {stored}


def test_tensorboard_gets_terms_and_pictures(tiny_run):
    folder = train(replace(tiny_run, logger="tensorboard"))
    assert sum(path.stat().st_size for path in (folder / "tensorboard").glob("events.*")) > 10_000


def test_float16_gradients_are_unscaled_before_they_are_clipped(tiny_run, monkeypatch):
    """Lightning would run 16-mixed as bfloat16 on a CPU, so its plugin is given the CPU's own GradScaler."""
    norms = []
    for name in ("plain", "scaled"):
        config = replace(without_adversary(tiny_run), name=name)
        if name == "scaled":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            plugin = MixedPrecision("16-mixed", "cpu", scaler)
            monkeypatch.setattr("vae.training.trainer.CheckedCheckpointIO", partial(lambda given: given, plugin))
            monkeypatch.setattr("vae.training.module.FUSED_ON", ())  # as 16-mixed has it
        folder = train(config)
        norms.append(_columns(folder)["train/autoencoder_gradient_norm"][0])
        monkeypatch.undo()
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_resuming_with_another_configuration_is_refused_by_key(finished, tiny_run):
    other = replace(tiny_run, resume=str(finished), optim=replace(tiny_run.optim, learning_rate=5e-2))
    with pytest.raises(InputError, match=r"optim\.learning_rate was 0\.001 and is 0\.05"):
        train(other)


def test_a_finished_run_can_be_made_longer(finished, tiny_run):
    longer = train(replace(tiny_run, resume=str(finished), updates=10))
    assert _checkpoint(longer)["global_step"] == 10
    updates = _columns(longer)["updates"]
    assert updates == sorted(set(updates))
    assert updates[-1] == 10
    assert {path.name for path in (longer / "exports").iterdir()} == {"best", "step_0000008", "step_0000010"}


def test_a_corrupt_image_is_named_also_by_a_worker(tiny_run, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_text("not an image")
    data = DataConfig(source="folder", root=str(tmp_path), resolution=32, batch_size=2, workers=1)
    with pytest.raises(InputError, match=r"none of the validation images can be read, expected some: skipped\.jsonl"):
        train(replace(tiny_run, data=data))
    lines = (Path(tiny_run.output) / tiny_run.name / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert listed
    assert all(re.search(r"\d\.png: no image in a format that is read", row["reason"]) for row in listed)


def test_a_run_that_died_before_its_first_checkpoint_can_be_started_again(tiny_run, monkeypatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vae.training.train.build_module", die)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run)
    monkeypatch.undo()
    assert _checkpoint(train(tiny_run))["global_step"] == 8


def test_wandb_runs_offline_without_a_key_and_never_asks(tiny_run, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(replace(tiny_run, logger="wandb", updates=2, validate_every=2))
    assert list((folder / "wandb").glob("offline-run-*"))


def test_a_compiled_run_has_the_parameter_names_of_an_eager_one(tiny_run, finished, monkeypatch):
    """With the backend that traces but does not generate code: seconds instead of minutes."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: original(self, backend="aot_eager", **given))
    folder = train(replace(tiny_run, name="compiled", compile=True))
    compiled, eager = (_checkpoint(path)["state_dict"] for path in (folder, finished))
    assert compiled.keys() == eager.keys()
    assert all(torch.allclose(compiled[name], eager[name], atol=1e-4) for name in eager)


def test_greyscale_trains(tiny_run):
    config = replace(tiny_run, model=replace(tiny_run.model, in_channels=1, out_channels=1))
    assert load_autoencoder(train(config) / "exports" / "step_0000008" / "diffusers").config.in_channels == 1


def test_updates_that_validation_does_not_divide_still_end_with_a_validation(tiny_run):
    folder = train(replace(tiny_run, updates=5, validate_every=3))
    assert (folder / "reconstructions" / "step_0000005.png").exists()
    assert _checkpoint(folder)["global_step"] == 5


def test_a_directory_that_holds_a_run_is_not_touched(finished, tiny_run):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("[!.]*")}
    with pytest.raises(InputError, match=r"already holds a run; choose another name, resume="):
        train(tiny_run)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("[!.]*")} == before


def test_a_folder_of_images_trains(tiny_run, tmp_path):
    for number in range(4):
        Image.effect_noise((40, 50), 60).save(tmp_path / f"{number}.png")
    data = DataConfig(source="folder", root=str(tmp_path), resolution=32, batch_size=2, workers=1)
    folder = train(replace(tiny_run, data=data))
    assert json.loads((folder / "config.json").read_text())["data"]["source"] == "folder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"max_steps": 5}}, r"trainer\.max_steps: set updates instead"),
        ({"trainer": {"fast_dev_run": True}}, r"trainer\.fast_dev_run: set updates instead"),
        ({"trainer": {"strategy": "fsdp"}}, r"trainer\.strategy='fsdp', expected one of \['auto', 'ddp'\]"),
        ({"trainer": {"devises": 2}}, r"trainer\.devises, expected an argument of lightning\.Trainer"),
        ({"trainer": {"devices": 0}}, r"trainer\.devices=0, expected 1 or more"),
        ({"trainer": {"precision": "8-bit"}}, r"trainer\.precision='8-bit', expected one of"),
        ({"trainer": {"accumulate_grad_batches": 0}}, r"trainer\.accumulate_grad_batches=0, expected 1 or more"),
        ({"trainer": {"log_every_n_steps": "abc"}}, r"trainer\.log_every_n_steps='abc', expected 1 or more"),
        ({"trainer": {"accelerator": "abacus"}}, r"trainer=\{'accelerator': 'abacus'\}: .*abacus"),
        ({"trainer": {"devices": "abc"}}, r"trainer=\{'devices': 'abc'\}: "),
        ({"trainer": {"plugins": []}}, r"trainer\.plugins: set trainer\.precision"),
        ({"resume": "/nowhere"}, r"resume='/nowhere', expected the directory of a run, or auto"),
        ({"output": "/proc/nowhere"}, r"/proc/nowhere/run: cannot write there"),
        ({"data": DataConfig(root="/nowhere", resolution=32)}, r"data\.root='/nowhere': no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_network_is_built(tiny_run, monkeypatch, change, message):
    monkeypatch.setattr("vae.training.train.AutoencoderModule", None)
    with pytest.raises(InputError, match=message):
        train(replace(tiny_run, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_float16_is_refused_where_it_would_silently_be_bfloat16(tiny_run):
    with pytest.raises(InputError, match="needs a GPU"):
        train(replace(tiny_run, trainer=tiny_run.trainer | {"precision": "16-mixed"}))
