"""`exports/best`: the weights of the best validation, whatever happens to the run."""

import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import read_json
from tests.training.harness import digest_of, logged, small_run
from tests.training.test_resume import cut_at
from vae.config.loss import LossConfig, LossWeights
from vae.config.schema import TrainConfig
from vae.errors import InputError, Stopped
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training import checkpointing as keeping
from vae.training import export as exporting
from vae.training.checkpointing import Kept, is_better
from vae.training.module import AutoencoderModule
from vae.training.train import train
from vae.training.validation import Validation
from vae.weights import load_autoencoder
from vae.weights.load import find_export

VALUES = {0: 99.0, 3: 20.0, 6: 25.0, 9: math.nan, 12: 25.0}  # {update: PSNR}
Averages = dict[int, dict[str, Tensor]]
_wholes: list[str] = []


@pytest.fixture
def averages(monkeypatch: pytest.MonkeyPatch) -> Averages:
    """Validations measure VALUES; {update: the averaged weights that were validated}, which the run fills."""
    begin, finish, seen = AutoencoderModule.on_validation_epoch_start, Validation.finish, {}

    def begun(self: AutoencoderModule) -> None:
        seen[self.updates] = {name: tensor.clone() for name, tensor in self.ema_model.state_dict().items()}
        begin(self)

    def finished(self: Validation) -> dict[str, float]:
        measured = finish(self)
        measured["psnr"] = VALUES[max(seen)]
        return measured

    monkeypatch.setattr(AutoencoderModule, "on_validation_epoch_start", begun)
    monkeypatch.setattr(Validation, "finish", finished)
    return seen


def same(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def digest_of_a_whole_run(output: Path, averages: Averages) -> str:
    """The same for all tests with VALUES."""
    if not _wholes:
        averages.clear()
        _wholes.append(digest_of(train(small_run(output / "whole", keep_best="psnr"))))
    return _wholes[0]


def test_the_first_of_the_highest_finite_values_is_kept_and_never_one_before_training(tmp_path, averages):
    run = train(small_run(tmp_path, keep_best="psnr"))
    best = run / "exports" / "best"
    assert read_json(best / "best.json") == {"updates": 6, "metric": "psnr", "value": 25.0}
    assert find_export(best) == best / "diffusers"
    for path in (best / "diffusers", best / "run.vae.safetensors"):
        assert same(load_autoencoder(path).state_dict(), averages[6])
    assert not same(averages[6], averages[12])
    _wholes[:] = [digest_of(run)]


@pytest.mark.parametrize(
    ("metric", "value", "kept", "better"),
    [
        ("psnr", 20.0, None, True),
        ("psnr", 20.1, 20.0, True),
        ("psnr", 20.0, 20.0, False),
        ("psnr", math.nan, None, False),
        ("psnr", math.inf, 20.0, False),
        ("ssim", 0.8, 0.7, True),
        ("lpips_vgg", 0.2, 0.1, False),
        ("lpips_vgg", 0.1, 0.2, True),
        ("rfid", 3.0, 4.0, True),
        ("rfid", math.nan, 4.0, False),
        ("kid", 0.003, 0.002, False),
    ],
)
def test_better_is_what_the_metric_says_it_is(metric, value, kept, better):
    assert is_better(metric, value, None if kept is None else Kept(3, metric, kept)) == better


def test_an_interrupted_run_keeps_the_same_best_to_the_byte(tmp_path, monkeypatch, averages):
    config = small_run(tmp_path, keep_best="psnr")
    run = cut_at(config, 7, monkeypatch)
    train(config)
    assert read_json(run / "exports" / "best" / "best.json")["updates"] == 6
    assert digest_of(run) == digest_of_a_whole_run(tmp_path, averages)


def test_what_is_cut_off_while_the_best_is_written_is_written_again(tmp_path, monkeypatch, averages):
    """After the first of its two layouts."""
    config, original = small_run(tmp_path, keep_best="psnr"), exporting.save_autoencoder

    def failing(model: AutoencoderKL, path: Path, format: str, **named: Any) -> Path:
        if max(averages) == 6 and format == "ldm":
            raise OSError("gone")
        return original(model, path, format, **named)

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save_autoencoder", failing)
        with pytest.raises(OSError, match="gone"):
            train(config)
    best = tmp_path / "run" / "exports" / "best"
    assert read_json(best / "best.json")["updates"] == 3
    assert same(load_autoencoder(best / "diffusers").state_dict(), averages[6])
    assert same(load_autoencoder(best / "run.vae.safetensors").state_dict(), averages[3])
    assert digest_of(train(config)) == digest_of_a_whole_run(tmp_path, averages)


def test_a_signal_while_the_best_is_written_ends_the_run_with_all_of_it(tmp_path, monkeypatch, averages):
    config, original = small_run(tmp_path, keep_best="psnr"), keeping.export

    def signalled(training: AutoencoderModule, *rest: Any) -> Any:
        if training.updates == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "export", signalled)
        with pytest.raises(Stopped):
            train(config)
    best = tmp_path / "run" / "exports" / "best"
    assert read_json(best / "best.json")["updates"] == 6
    assert same(load_autoencoder(best / "run.vae.safetensors").state_dict(), averages[6])


def test_keeping_the_best_changes_nothing_else(tmp_path, monkeypatch):
    """And the best of the last update is byte for byte what is exported of it."""
    monkeypatch.setattr(keeping, "is_better", lambda *_: True)
    kept = train(small_run(tmp_path / "kept", keep_best="ssim"))
    plain = train(small_run(tmp_path / "plain"))
    assert not (plain / "exports" / "best").exists()
    best = kept / "exports" / "best"
    assert read_json(best / "best.json")["updates"] == 12
    for path in (kept / "exports" / "step_0000012").rglob("*.*"):
        assert (best / path.relative_to(kept / "exports" / "step_0000012")).read_bytes() == path.read_bytes()
    best.rename(kept / "aside")
    assert digest_of(kept) == digest_of(plain)
    assert logged(kept) == logged(plain)


def test_the_best_of_another_metric_does_not_count(tmp_path, monkeypatch, averages, capsys):
    config = small_run(tmp_path, keep_best="psnr")
    run = cut_at(config, 7, monkeypatch)
    train(replace(config, keep_best="ssim"))
    assert "note: keep_best was 'psnr' and is 'ssim'" in capsys.readouterr().out
    record = read_json(run / "exports" / "best" / "best.json")
    assert record["metric"] == "ssim"
    assert record["updates"] > 6


def test_what_the_best_needs_of_the_disk_is_asked_for_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    needed = []
    for config in (small_run(tmp_path / "plain"), small_run(tmp_path / "kept", keep_best="psnr")):
        with pytest.raises(WeightsError, match=r"checkpoints: needs [\d,]+ bytes and 1,000 are free") as refused:
            train(config)
        needed.append(int(re.findall(r"needs ([\d,]+)", str(refused.value))[0].replace(",", "")))
    weights = sum(tensor.nbytes for tensor in AutoencoderModule(small_run(tmp_path)).ema_model.state_dict().values())
    assert needed[1] - needed[0] == 4 * weights


def test_a_record_that_is_not_ours_is_refused_before_training(tmp_path, monkeypatch):
    config = small_run(tmp_path, keep_best="psnr")
    run = cut_at(config, 4, monkeypatch)
    (run / "exports" / "best" / "best.json").write_text('{"updates": 3}')
    with pytest.raises(InputError, match=r"best\.json: not what this version of vae writes; delete it"):
        train(config)


def test_the_best_is_by_lpips_where_that_is_measured(tmp_path):
    """A discriminator costs PSNR, which would keep the weights from before it was felt."""
    with_lpips = LossConfig(perceptual_net="alex", weights=LossWeights())
    assert TrainConfig(loss=with_lpips).best_metric == "lpips_alex"
    assert TrainConfig(loss=LossConfig(weights=LossWeights(perceptual=0.0))).best_metric == "psnr"
    assert small_run(tmp_path).best_metric is None


@pytest.mark.parametrize(
    ("keep_best", "channels", "message"),
    [
        ("lpips_alex", 3, r"keep_best='lpips_alex', expected auto, null or one of \['ssim', 'psnr', 'rfid', 'kid'\]"),
        ("rfid", 1, r"keep_best='rfid', expected auto, null or one of \['ssim', 'psnr'\]"),
        ("rfid_clean", 3, r"keep_best='rfid_clean'"),
    ],
)
def test_what_no_validation_measures_is_refused(tmp_path, keep_best, channels, message):
    config = small_run(tmp_path)
    model = replace(config.model, in_channels=channels, out_channels=channels)
    with pytest.raises(InputError, match=message):
        replace(config, model=model, keep_best=keep_best)
