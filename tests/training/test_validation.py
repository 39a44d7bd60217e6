"""rFID and KID of a validation: of all its images once, and nothing where there are no weights for them."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import read_json
from tests.training.driven import Corners
from tests.training.harness import digest_of, logged, small_run
from tests.training.images import noise, on
from tests.training.test_processes import of_processes, run
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.metrics.paired import PairedMetrics
from vae.metrics.set_distances import frechet_distance, kernel_distance
from vae.models.inception import Inception
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian
from vae.training.callbacks import Advice
from vae.training.module import AutoencoderModule
from vae.training.train import train
from vae.training.validation import SetMetrics


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["val/psnr"]]


def distances(images: Tensor, reconstructions: Tensor, batches: Sequence[list[int]]) -> dict[str, float]:
    inception: Any = Corners()
    sets = SetMetrics(inception)
    for batch in batches:
        sets.update(batch, images[batch], reconstructions[batch])
    return sets.finish()


def test_neither_batches_nor_their_order_decide_a_bit():
    images, reconstructions = torch.randint(0, 256, (2, 10, 3, 8, 8), dtype=torch.uint8)
    whole = distances(images, reconstructions, [list(range(10))])
    features = [Corners().features(one, "legacy").numpy() for one in (images, reconstructions)]
    assert whole == {"rfid": frechet_distance(*features), "kid": kernel_distance(*features)}
    assert distances(images, reconstructions, [[7, 8, 9], [3], [4, 6], [0, 1, 2, 5]]) == whole
    assert distances(images, images, [list(range(10))]) == {"rfid": 0.0, "kid": pytest.approx(0.0, abs=1e-9)}
    assert distances(images, reconstructions, [[4]]) == {}


def test_without_weights_nothing_is_said_since_nobody_asked_and_nothing_else_changes(tmp_path, monkeypatch, capsys):
    without = train(small_run(tmp_path / "without"))
    said = capsys.readouterr().out
    assert "rFID" not in said
    inception: Any = Corners()
    monkeypatch.setattr(SetMetrics, "of", lambda _: SetMetrics(inception))
    with_features = train(small_run(tmp_path / "with"))
    assert digest_of(without) == digest_of(with_features)
    plain, more = logged(without), logged(with_features)
    assert [{name: row[name] for name in plain[0]} for row in more] == plain
    assert more[0].keys() - plain[0].keys() == {"val/rfid", "val/kid"}
    assert all(float(row["val/rfid"]) > 0 for row in more if row["val/psnr"])


@pytest.mark.parametrize("asked", [{"keep_best": "rfid"}, {"inception": "/nowhere.pth"}])
def test_weights_that_are_asked_for_must_be_there(tmp_path, asked):
    with pytest.raises(InputError, match=r"keep_best=.*(weights-inception-2015-12-05-6726825d\.pth)"):
        train(replace(small_run(tmp_path), **asked))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_inception_is_refused_where_images_are_not_rgb(tmp_path):
    config = small_run(tmp_path)
    grey = replace(config.model, in_channels=1, out_channels=1)
    with pytest.raises(InputError, match=r"inception='x\.pth' with model\.out_channels=1, expected null"):
        replace(config, model=grey, inception="x.pth")


def test_the_best_by_rfid_with_weights_of_ones_own(tmp_path):
    """Random ones; as a frozen network is not state, they are in no checkpoint."""
    path = tmp_path / "inception.safetensors"
    save_file(Inception().state_dict(), path)
    config = replace(small_run(tmp_path), updates=1, keep_best="rfid", inception=str(path))
    config = replace(config, data=replace(config.data, validation_images=2))
    folder = train(config)
    record = read_json(folder / "exports" / "best" / "best.json")
    assert (record["updates"], record["metric"]) == (1, "rfid")
    assert record["value"] == pytest.approx(float(rows_of(folder)[-1]["val/rfid"]), rel=1e-6)
    saved = torch.load(folder / "checkpoints" / "step_0000001.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "Mixed" in name or "inception" in name]


def test_several_processes_measure_every_image_once_and_keep_one_best(tmp_path, monkeypatch):
    """Before the first update their weights are the same bits as those of one, so the distances must be."""
    inception: Any = Corners()
    config = replace(small_run(tmp_path / "together", keep_best="rfid"), updates=3)
    together = run(of_processes(config, 2), "features")
    monkeypatch.setattr(SetMetrics, "of", lambda _: SetMetrics(inception))
    alone = train(of_processes(replace(config, output=str(tmp_path / "alone"), updates=1), 1))
    expected, (first, last) = rows_of(alone)[0], rows_of(together)
    assert [first[name] for name in ("val/rfid", "val/kid")] == [expected[name] for name in ("val/rfid", "val/kid")]
    record = read_json(together / "exports" / "best" / "best.json")
    assert record["updates"] == 3
    assert record["value"] == pytest.approx(float(last["val/rfid"]), rel=1e-6)


def of_two_channels(output: Path) -> TrainConfig:
    """A run on flow-like images, of which LPIPS sees the first, the second and the second again."""
    for side, count in (("train", 4), ("val", 2)):
        (output / "images" / side).mkdir(parents=True)
        for number in range(count):
            np.save(output / "images" / side / f"{number}.npy", noise(40, 48, number, channels=2))
    config = on(small_run(output / "runs", keep_best="auto"), output / "images")
    weights = replace(config.loss.weights, perceptual=0.5, adversarial=0.0)
    loss = replace(config.loss, weights=weights, perceptual_net="alex", perceptual_channels=[0, 1, 1])
    model = replace(config.model, in_channels=2, out_channels=2)
    return replace(config, model=model, loss=loss, updates=2, validate_every=2)


def test_lpips_of_chosen_channels_is_measured_and_the_best_by_it_kept(tmp_path):
    folder = train(of_two_channels(tmp_path))
    measured = [float(row["val/lpips_alex"]) for row in rows_of(folder)]
    assert all(0 < value < 10 for value in measured)
    record = read_json(folder / "exports" / "best" / "best.json")
    assert (record["metric"], record["value"]) == ("lpips_alex", pytest.approx(measured[-1], rel=1e-6))


def test_a_validation_sees_the_channels_that_the_loss_sees():
    network = LPIPS("alex", channels=[0, 1, 1])
    images, reconstructions = torch.randint(0, 256, (2, 3, 2, 40, 40), dtype=torch.uint8)
    found = PairedMetrics(("lpips_alex",), shared=network)(images, reconstructions)["lpips_alex"]
    three = (one[:, [0, 1, 1]] for one in (images, reconstructions))
    torch.testing.assert_close(found, PairedMetrics(("lpips_alex",))(*three)["lpips_alex"])
    assert PairedMetrics(("lpips_alex",))(images, reconstructions) == {}
    assert PairedMetrics(("lpips_alex",), shared=network)(images[..., :30], reconstructions[..., :30]) == {}


def told_of_validations(config: TrainConfig, count: int, side: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of three validations of `count` images of `side` pixels each way."""
    training, advice = AutoencoderModule(config), Advice(every=1)
    images, reconstructions = torch.randint(0, 256, (2, count, 3, side, side), dtype=torch.uint8)
    posterior = DiagonalGaussian(torch.randn(count, 3, 4, 4), torch.full((count, 3, 4, 4), -3.0))
    for updates in (0, 10, 20):
        training.validation.start()
        training.validation.update(list(range(count)), images, reconstructions, posterior)
        training.validation.finish()
        trainer: Any = SimpleNamespace(is_global_zero=True, global_step=updates)
        training.__dict__["_trainer"] = trainer
        advice.on_validation_end(trainer, training)
    return " ".join(capsys.readouterr().err.split())


def test_a_metric_that_is_never_finite_is_said_once_with_the_reason_and_what_becomes_of_the_best(tmp_path, capsys):
    by_ssim, by_psnr = (small_run(tmp_path, keep_best=metric) for metric in ("ssim", "psnr"))
    reason = "validation has no finite ssim: needs images of 11 pixels a side or more; these have 8"
    of_the_best = "; exports/best is chosen by it, and this validation writes none: keep_best= names another metric"
    assert told_of_validations(by_ssim, 2, 8, capsys) == f"note, update 0: {reason}{of_the_best}"
    assert told_of_validations(by_psnr, 2, 8, capsys) == f"note, update 0: {reason}"
    assert told_of_validations(by_ssim, 2, 16, capsys) == ""


def test_a_distance_of_sets_that_one_image_cannot_have_is_said(tmp_path, monkeypatch, capsys):
    inception: Any = Corners()
    monkeypatch.setattr(SetMetrics, "of", lambda _: SetMetrics(inception))
    config = small_run(tmp_path, keep_best="rfid")
    assert "validation has no finite rfid: it takes two images" in told_of_validations(config, 1, 16, capsys)
    assert told_of_validations(config, 2, 16, capsys) == ""
