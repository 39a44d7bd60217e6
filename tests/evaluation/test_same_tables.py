"""The same tables, byte for byte: for any number of processes, any batch size, and after any kill."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.evaluation.ranks import FILES, config_of, forked, in_processes, pictures, saved_model
from vae.errors import InputError
from vae.evaluation.run import evaluate

FEW = ["psnr", "ssim", "contrast", "rfid", "kid_clean"]
ROOT = Path(__file__).resolve().parent.parent.parent


class SmallFeatures:
    """In the place of Inception, whose weights are not at hand: means of the quarters of an image."""

    def features(self, images: Tensor, convention: str) -> Tensor:
        side = 2 if convention == "clean" else 3
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), side).flatten(1)


@pytest.fixture
def with_features(monkeypatch):
    monkeypatch.setattr("vae.evaluation.setting.load_inception", lambda *_, **__: SmallFeatures())


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("count", [10, 33])
def test_tables_are_the_same_for_any_number_of_processes_and_any_batch_size(tmp_path, tiny, with_features, count):
    images = pictures(tmp_path / "images", count)
    models = [saved_model(tmp_path / name, tiny, seed) for seed, name in enumerate(("a", "b"))]
    config = config_of(tmp_path, images, models, metrics=FEW, probe_images=0)
    alone = files_of(evaluate(replace(config, name="alone")))
    assert b"," in alone["images.csv"]
    for world in (1, 2, 3, 4):
        batches = (1, 3, 7)
        each = [
            replace(config, name=f"{world}x{batch}", data=replace(config.data, validation_batch_size=batch))
            for batch in batches
        ]
        in_processes(world, each)
        for one in each:
            assert files_of(tmp_path / one.name) == alone, one.name


def test_an_evaluation_killed_at_random_ten_times_ends_with_the_same_tables(tmp_path, tiny, with_features):
    images = pictures(tmp_path / "images", 33)
    model = saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], metrics=FEW, probe_images=0)
    began = time.monotonic()
    whole = files_of(evaluate(replace(config, name="whole")))
    takes, draw, killed = time.monotonic() - began, random.Random(0), 0
    for number in range(10):
        again = replace(config, name=f"killed{number}")
        process = forked(lambda again=again: evaluate(again))
        process.join(draw.random() * takes)
        killed += process.exitcode is None
        process.kill()
        process.join()
        if not (tmp_path / again.name / "metrics.json").exists():
            evaluate(again)
        assert files_of(tmp_path / again.name) == whole
    print(f"{killed} of 10 were killed before their end")
    assert killed >= 5


def test_torchrun_works(tmp_path, tiny):
    images, model = pictures(tmp_path / "images", 10), saved_model(tmp_path / "a", tiny)
    wanted = ["data=folder", f"data.root={images}", "data.resolution=32", "data.workers=0", "probe_images=0"]
    wanted += [f"model={model}", "metrics=[psnr,ssim]", f"output={tmp_path}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launched in (("alone", []), ("shared", launcher)):
        command = [sys.executable, *launched, str(ROOT / "evaluate.py"), *wanted, f"name={name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")


def test_an_evaluation_goes_on_only_with_the_same_models_images_and_settings(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 6), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vae.evaluation.run.finish", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"name='e': .* holds an interrupted evaluation of other"):
        evaluate(replace(config, metrics=["psnr"]))
    saved_model(Path(model), tiny, seed=5)
    with pytest.raises(InputError, match="holds an interrupted evaluation of other"):
        evaluate(config)
    saved_model(Path(model), tiny)
    evaluate(config)
    with pytest.raises(InputError, match="already holds an evaluation; choose another name"):
        evaluate(config)
