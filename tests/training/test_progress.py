"""What a run says of itself while it goes: its first lines, a line at each validation and every so often, its pace."""

import csv
import re
from dataclasses import replace

import pytest
import torch

from tests.conftest import without_adversary
from vae.config.loss import LossConfig, LossWeights
from vae.losses.autoencoder_loss import total
from vae.training import terminal
from vae.training.terminal import counted, duration
from vae.training.train import train


def test_a_run_without_a_terminal_says_what_it_is_and_how_it_goes(tiny_run, monkeypatch, capsys):
    """D1: redirected to a file, a run was mute until its end."""
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    run = train(replace(tiny_run, keep_best="psnr"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("AutoencoderKL f2c3 of ")
    assert "11 training and 5 validation images of photos at 32 px, updates 0 to 8" in said[0]
    assert said[0].endswith(f"everything goes to {run}")
    assert re.fullmatch(r"On CPU, precision 32-true, 1 thread, 0 data workers, 2 images an update", said[1])

    validations = [line for line in said if line.startswith("validation at update ")]
    assert [line.split(":")[0] for line in validations] == [f"validation at update {n} of 8" for n in (0, 4, 8)]
    assert all(re.search(r": psnr \d+\.\d+, ssim \d\.\d+", line) for line in validations)
    assert "new best" not in validations[0]
    assert sum("new best psnr" in line for line in validations) >= 1

    updates = [line for line in said if re.match(r"update \d of 8: total ", line)]
    assert len(updates) >= 6
    assert all(re.search(r"pixel [\d.e-]+.*, [\d.e+]+ images/s, \d+ s left$", line) for line in updates)


def test_a_run_ends_in_ten_lines_with_what_came_of_it_first(tiny_run, capsys):
    train(replace(tiny_run, keep_best="psnr"))
    said = capsys.readouterr().out.splitlines()
    end = said[next(number for number, line in enumerate(said) if line.startswith("done: ")) :]
    assert len(end) <= 10
    assert re.match(r"done: psnr \d+\.\d+ -> \d+\.\d+, ssim .* \(EMA weights, held-out images\)$", end[0])
    assert any("exports/best, the best: update" in line for line in end)
    assert any("curves.html" in line for line in end)


def test_every_table_is_printed_on_demand(tiny_run, capsys):
    train(replace(without_adversary(tiny_run), updates=2, verbose=True))
    assert "validation (EMA weights)" in capsys.readouterr().out


def test_the_pace_and_the_weighted_sum_are_in_the_metrics_file(tiny_run):
    run = train(without_adversary(tiny_run))
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/pixel"]]
    assert all(float(row["pace/images_per_second"]) > 0 for row in rows)
    seconds = [float(row["pace/seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    weights = tiny_run.loss.weights
    for row in rows:
        expected = weights.pixel * float(row["train/pixel"]) + weights.kl * float(row["train/kl"])
        assert float(row["train/total"]) == pytest.approx(expected, rel=1e-5)


def test_the_weighted_sum_has_the_ramps_and_the_adaptive_weight():
    weights = LossWeights(pixel=2.0, perceptual=0.0, kl=0.5, adversarial=0.1)
    config = LossConfig(weights=weights, kl_warmup=10, discriminator_start=0, adversarial_start=3, adversarial_ramp=4)
    logs = {name: torch.tensor(value) for name, value in {"pixel": 3.0, "kl": 8.0, "adversarial": 5.0}.items()}
    logs["adaptive_weight"] = torch.tensor(7.0)
    expected = 2.0 * 3.0 + 0.5 * (5 / 10) * 8.0 + 0.1 * (2 / 4) * 7.0 * 5.0
    assert total(logs, config, updates=4).item() == pytest.approx(expected)
    assert total({}, config, updates=4).item() == 0.0


def test_times_and_numbers_are_written_for_people():
    assert [duration(seconds) for seconds in (3.4, 59, 61)] == ["3 s", "59 s", "1 min"]
    assert [duration(seconds) for seconds in (3600, 7500)] == ["1 h 0 min", "2 h 5 min"]
    assert [counted(number, "update") for number in (1, 2, 1000)] == ["1 update", "2 updates", "1,000 updates"]
