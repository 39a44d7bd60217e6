"""Every shipped YAML composes into the schema and builds; every refusal is one line."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image

from tests.presets import CONFIGS
from vae.cli.evaluate import measure
from vae.cli.train import train_and_compare
from vae.config.compose import compose, run
from vae.config.loss import LossConfig
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.errors import Stopped
from vae.models.base import build_autoencoder
from vae.models.discriminator import PatchDiscriminator
from vae.training.optim import build_optimiser

GROUPS = ("model", "loss", "data", "optim", "trainer", "experiment")
VARIANTS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_composes_and_builds(variant):
    extra = ["data.root=photos"] if variant.startswith("data=") and variant != "data=photos" else []
    asked = ["init=base", "teacher=teacher"] if variant.startswith("experiment=") else []
    config = compose(variant, *extra, *asked)
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.model)
        discriminator = PatchDiscriminator(config.loss.discriminator)
    build_optimiser(config.optim, autoencoder, discriminator, config.updates, config.loss.starts)


def test_the_defaults_of_the_yaml_are_those_of_the_dataclasses():
    config = compose()
    plain = TrainConfig()
    assert (config.loss, config.optim, config.model) == (LossConfig(), plain.optim, plain.model)


def test_every_experiment_says_how_it_is_run():
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_", path
        assert f"experiment={path.stem}" in lines[1], path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a door with overrides in an empty folder; gives (exit status, action called with)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(name: str, *overrides: str, action=None) -> tuple[int, list[object]]:
        seen: list[object] = []
        monkeypatch.setattr("sys.argv", [name, *overrides])
        try:
            run(name, action or seen.append, sys.argv)
        except SystemExit as leaving:
            return cast(int, leaving.code), seen
        return 0, seen

    return call


REFUSED = {
    "modle=3": "modle: no such key; did you mean model?",
    "model.latent_chanels=3": "model.latent_chanels: no such key; did you mean latent_channels?",
    "frozen=encoder": "expected a list: 'frozen=[...]'",
    "model.latent_channels=abc": "model.latent_channels: 'abc' is not a whole number",
    "updates=1.5": "updates: '1.5' is not a whole number",
    "model=sdd": "model=sdd: no such choice; did you mean sd?",
    "model.norm_num_groups=7": "model.block_out_channels=[128, 256, 512, 512], expected 1 to 12 widths, each a",
    "data.resolution=100": "data.resolution=100, expected a multiple of the model's downsampling factor 8, e.g. 96",
    "data.batch_size=0": "data.batch_size=0, expected 1 or more",
    "loss.pixel=l7": "loss.pixel='l7', expected one of ['charbonnier', 'l1', 'l2']",
    "loss.weights.style=1": "loss.weights.style: no such key; known are pixel, perceptual",
    "logger=paper": "logger='paper', expected one of ['csv', 'wandb', 'tensorboard']",
    "name=a/b": "name='a/b', expected a plain folder name",
    "data=folder": "data.root is not set",
    "model.in_channels=4": "model.in_channels=4 and model.out_channels=3, expected the same number",
    "optim.learning_rate=-1": "optim.learning_rate=-1.0, expected a positive number",
    "data.name=a=b": "data.name=a=b: not readable as a value",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_refused_input_is_one_line_and_status_two(command, capsys, override, message):
    status, seen = command("train", override)
    lines = capsys.readouterr().err.splitlines()
    assert (status, seen) == (2, [])
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not list(Path.cwd().iterdir())


def test_tracebacks_are_shown_when_asked_for(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="logger='paper'"):
        command("train", "logger=paper")


def test_a_defect_of_ours_keeps_its_traceback(command):
    def defective(config: TrainConfig) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        command("train", action=defective)


def test_a_runs_directory_is_enough_to_go_on_with_its_own_configuration(command, tmp_path):
    """Of the command line what is said there counts on top; groups on it are the whole configuration again."""
    saved = replace(compose("experiment=quickstart"), name="first", seed=7)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text(json.dumps(asdict(saved)))
    resume = f"resume={tmp_path / 'first'}"
    assert command("train", resume)[1] == [replace(saved, resume=str(tmp_path / "first"))]
    (longer,) = command("train", resume, "updates=2000", "+trainer.detect_anomaly=true")[1]
    assert longer.updates == 2000
    assert longer.trainer == saved.trainer | {"detect_anomaly": True}
    assert longer.seed == 7
    (again,) = command("train", resume, "experiment=quickstart")[1]
    assert again.seed == 0


def test_an_early_end_is_one_line_with_its_status(command, capsys):
    def ends(config: TrainConfig) -> None:
        raise Stopped(143, "stopped by SIGTERM after update 3")

    assert command("train", action=ends)[0] == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after update 3\n"


def test_a_model_to_measure_is_a_path_and_not_a_group(command):
    status, (config,) = command("evaluate", "model=[runs/a,runs/b]", "data=folder", "data.root=photos")
    assert status == 0
    assert isinstance(config, EvaluateConfig)
    assert config.models == ["runs/a", "runs/b"]
    assert config.data.validation_images is None
    assert config.data.validation_fraction == 1.0


def test_a_corrupt_image_met_by_a_data_worker_is_one_line(command, capsys, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_text("not an image")
    (tmp_path / "others").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "others" / "whole.png")
    overrides = ["model=tiny", "data=folder", f"data.root={folder}", "data.resolution=32", "loss=plain"]
    small = [
        f"data.validation_root={tmp_path}/others",
        "data.workers=1",
        "loss.weights.perceptual=0",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    ]
    assert command("train", *overrides, *small, action=train_and_compare)[0] == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: 100 images in a row cannot be used, the last: {folder}/")
    assert line.endswith("replace or remove it")


def test_the_doors_lead_to_training_and_evaluation(command, capsys):
    assert command("train", "data=folder", "data.root=/nowhere", action=train_and_compare)[0] == 2
    assert command("evaluate", "model=/nowhere", action=measure)[0] == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "data.root='/nowhere': no such folder" in first
    assert "model='/nowhere': no such file or folder" in second


@pytest.mark.parametrize(
    "root", ["shards/{000..004}.tar", "a/*.tar", "it's (1), [2] = 3.txt", "my photos", r"back\slash"]
)
def test_patterns_and_odd_paths_need_no_quotes_of_hydras(root):
    assert compose("data=webdataset", f"data.root={root}").data.root == root


def test_a_path_may_be_quoted_null_or_refer_to_another():
    config = compose("data=webdataset", "data.root='{0..1}.tar'", "data.validation_root=${data.root}")
    assert (config.data.root, config.data.validation_root) == ("{0..1}.tar", "{0..1}.tar")
    assert compose("data=photos", "data.root=null").data.root is None
