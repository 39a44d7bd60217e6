"""float16's loss scale: an update that overflows is made again at half the scale, so that none is left out."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.conftest import without_adversary
from tests.training.driven import SCALES, scaled_trainer
from tests.training.harness import digest_of, small_run
from tests.training.test_never_lost import poisoned_run
from tests.training.test_resume import cut_at
from vae.config.schema import TrainConfig
from vae.errors import Stopped
from vae.training.manifest import checkpoints_in, newest_whole
from vae.training.train import train

OVERFLOWS, FITS = SCALES["overflowing"], SCALES["fitting"]
LEAST = 2.0**-10

Scaled = Callable[..., None]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Scaled:
    """From now on runs have a loss scale."""

    def at(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr("vae.training.train.build_trainer", scaled_trainer(*arguments, **named))
        monkeypatch.setattr("vae.training.module.FUSED_ON", ())  # as 16-mixed has it

    return at


def checkpoint_of(run: Path) -> dict[str, Any]:
    return torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scales_of(run: Path) -> list[float]:
    """By update."""
    return [float(row["train/loss_scale"]) for row in rows_of(run) if row["train/loss_scale"]]


def with_schedule(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, schedule="cosine", warmup_updates=4))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_of_which_updates_overflow_is_to_the_bit_the_one_of_which_none_does(tmp_path, scaled, accumulate):
    """Weights, averages, moments and running means, and the schedule: every image was learned from once."""
    config = with_schedule(small_run(tmp_path, accumulate=accumulate))
    scaled(OVERFLOWS)
    high = train(config)
    assert FITS < scales_of(high)[0] < OVERFLOWS
    scaled(FITS)
    low = train(replace(config, name="low"))
    assert scales_of(low) == [FITS] * 12
    assert digest_of(high) == digest_of(low)
    columns = ("updates", "train/learning_rate", "val/psnr")
    clocks = [[[row[column] for column in columns] for row in rows_of(run)] for run in (high, low)]
    assert clocks[0] == clocks[1]
    assert checkpoint_of(high)["lr_schedulers"] == checkpoint_of(low)["lr_schedulers"]


def test_in_float16_itself_every_update_is_made(tmp_path, scaled):
    config = replace(small_run(tmp_path), updates=6, validate_every=6)
    scaled(OVERFLOWS, kind=MixedPrecision)
    run = train(config)
    assert all(scale < OVERFLOWS for scale in scales_of(run))
    steps = [int(state["step"]) for state in checkpoint_of(run)["optimizer_states"][0]["state"].values()]
    assert set(steps) == {6, 6 - config.loss.discriminator_start}


def test_a_run_that_overflows_is_resumed_to_the_same_bits_and_the_same_scale(tmp_path, monkeypatch, scaled):
    config = small_run(tmp_path, accumulate=2)
    scaled(OVERFLOWS, growth_interval=4)
    run = cut_at(config, 7, monkeypatch)
    assert checkpoints_in(run / "checkpoints")[0].name == "step_0000008.ckpt"
    train(config)
    whole = train(replace(config, name="whole"))
    assert digest_of(run) == digest_of(whole)
    assert checkpoint_of(run)["Saturating"] == checkpoint_of(whole)["Saturating"]


def test_what_overflows_at_every_scale_ends_the_run_and_the_scale_stays(tmp_path, monkeypatch, scaled):
    """A gradient that is not finite for another reason: named as in float32, and the run can go on from its scale."""
    scaled(LEAST)
    with pytest.raises(Stopped, match=r"update 9 is not finite: gradients of autoencoder\.decoder\.conv_in\.weight"):
        poisoned_run(small_run(tmp_path), "autoencoder gradient", math.inf, monkeypatch)
    saved = checkpoint_of(tmp_path / "run")
    assert saved["global_step"] == 8
    assert saved["Saturating"]["scale"] == LEAST


def test_an_update_that_the_guard_leaves_out_is_not_made_again_and_the_scale_stays(tmp_path, monkeypatch, scaled):
    scaled(LEAST)
    config = replace(small_run(tmp_path), guard=replace(small_run(tmp_path).guard, on_non_finite="skip", limit=4))
    poisoned_run(config, "autoencoder gradient", math.inf, monkeypatch)
    saved = checkpoint_of(tmp_path / "run")
    assert (saved["left_out"], saved["global_step"]) == (4, 12)
    assert saved["Saturating"]["scale"] == LEAST


def test_many_updates_that_overflow_are_said_and_a_few_are_not(tmp_path, scaled, capsys):
    """The scale that doubles after every update is too high in every second one at least."""
    config = replace(without_adversary(small_run(tmp_path)), updates=20, validate_every=20)
    scaled(OVERFLOWS, growth_interval=1)
    train(config)
    assert capsys.readouterr().err.count("overflow float16") == 1
    scaled(OVERFLOWS)
    train(replace(config, name="few", updates=2))
    assert "overflow float16" not in capsys.readouterr().err


def test_a_scale_at_which_small_gradients_vanish_is_said(tmp_path, scaled, capsys):
    scaled(2.0**-3)
    train(replace(without_adversary(small_run(tmp_path)), updates=20, validate_every=20))
    assert "loss scale is below 1" in capsys.readouterr().err
