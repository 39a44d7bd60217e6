"""The same tables, byte for byte: for any number of processes, any batch size, and after any kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import read_json
from tests.evaluation.ranks import FILES, config_of, forked, in_processes, pictures, saved_model
from vae.config.schema import EvaluateConfig
from vae.errors import InputError, Stopped
from vae.evaluation.evaluate import evaluate
from vae.evaluation.measure import Evaluator
from vae.evaluation.setup import code_sha256

FEW = ["psnr", "ssim", "contrast", "rfid", "kid_clean"]
ROOT = Path(__file__).resolve().parent.parent.parent


class SmallFeatures(torch.nn.Module):
    """In the place of Inception, whose weights are not at hand: means of the quarters of an image."""

    def features(self, images: Tensor, convention: str) -> Tensor:
        side = 2 if convention == "clean" else 3
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), side).flatten(1)


@pytest.fixture
def with_features(monkeypatch):
    monkeypatch.setattr("vae.evaluation.setup.load_inception", lambda *_, **__: SmallFeatures())


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("count", [10, 33])
def test_tables_are_the_same_for_any_number_of_processes_and_any_batch_size(tmp_path, tiny, with_features, count):
    images = pictures(tmp_path / "images", count)
    config = config_of(tmp_path, images, [saved_model(tmp_path / "a", tiny)], metrics=FEW, probe_images=0)
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
    whole = files_of(evaluate(replace(config, name="whole")))
    again, draw, lines = replace(config, name="killed"), random.Random(0), 0
    for _ in range(10):
        lines += draw.randrange(1, 4)
        process = forked(lambda: evaluate(again))
        _wait_for_lines(tmp_path / "killed" / "rows_0.jsonl", lines, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "metrics.json").exists()
    assert files_of(evaluate(again)) == whole


def _wait_for_lines(rows: Path, count: int, process: BaseProcess) -> None:
    while process.is_alive() and (not rows.exists() or rows.read_bytes().count(b"\n") < count):
        time.sleep(0.001)


def test_batches_of_a_gpu_are_filled_up_and_what_fills_them_is_not_counted(tmp_path, tiny, with_features, monkeypatch):
    images, model = pictures(tmp_path / "images", 10), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], batch=4, metrics=FEW, probe_images=0)
    one_by_one = evaluate(replace(config, name="one"))
    sizes = []
    lines = Evaluator._lines
    monkeypatch.setattr(Evaluator, "at_once", 4)
    monkeypatch.setattr(
        Evaluator, "_lines", lambda self, x, indices: (sizes.append(len(x)), lines(self, x, indices))[1]
    )
    filled = evaluate(replace(config, name="filled"))
    assert sizes == [4, 4, 4]
    tables = [read_json(folder / "metrics.json")["metrics"]["images"]["a"] for folder in (one_by_one, filled)]
    for name in FEW:
        assert tables[1][name]["images"] == 10
        assert tables[1][name]["mean"] == pytest.approx(tables[0][name]["mean"], rel=1e-3)


def test_torchrun_works(tmp_path, tiny):
    images, model = pictures(tmp_path / "images", 10), saved_model(tmp_path / "a", tiny)
    alone = evaluate(config_of(tmp_path, images, [model], name="alone", metrics=["psnr", "ssim"], probe_images=0))
    wanted = ["data=folder", f"data.root={images}", "data.resolution=32", "data.workers=0", "probe_images=0"]
    wanted += [f"model={model}", "metrics=[psnr,ssim]", f"output={tmp_path}", "name=shared"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(ROOT / "evaluate.py"), *wanted]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "shared") == files_of(alone)


def test_an_image_that_was_repaired_since_is_measured(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 4), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], metrics=FEW[:3], probe_images=0)
    whole = evaluate(replace(config, name="whole"))
    pixels = (images / "001.png").read_bytes()
    (images / "001.png").write_bytes(bytes(len(pixels)))
    monkeypatch.setattr("vae.evaluation.evaluate.finish", stop)
    with pytest.raises(Stopped):
        evaluate(replace(config, name="repaired"))
    monkeypatch.undo()
    (images / "001.png").write_bytes(pixels)
    assert files_of(evaluate(replace(config, name="repaired"))) == files_of(whole)


def test_rows_that_another_machine_has_to_itself_are_missed(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 4), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e", probe_images=0)
    monkeypatch.setattr("vae.evaluation.evaluate._missing", lambda *_: [0, 2])
    with pytest.raises(InputError, match="2 of 4 images of images have rows: output= must be one folder"):
        evaluate(config)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_inception_is_where_the_images_are(tmp_path, tiny, monkeypatch):
    moved: list[torch.device] = []

    class Moved(SmallFeatures):
        def to(self, *args: Any, **kwargs: Any) -> "Moved":
            moved.append(args[0])
            return self

    monkeypatch.setattr("vae.evaluation.setup.load_inception", lambda *_, **__: Moved())
    images, model = pictures(tmp_path / "images", 3), saved_model(tmp_path / "a", tiny)
    evaluate(config_of(tmp_path, images, [model], name="e", metrics=["psnr", "kid"], probe_images=0))
    assert moved == [torch.device("cpu" if not torch.cuda.is_available() else "cuda")]


def test_a_data_set_without_a_readable_image_has_no_numbers_and_the_others_have_theirs(tmp_path, tiny, with_features):
    images, model = pictures(tmp_path / "images", 3), saved_model(tmp_path / "a", tiny)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"nothing")
    given = config_of(
        tmp_path, tmp_path / "bad", [model], name="e", metrics=FEW, datasets=[str(tmp_path / "bad"), str(images)]
    )
    with pytest.raises(Stopped, match="1 of 4 images are skipped"):
        evaluate(given)
    found = read_json(tmp_path / "e" / "metrics.json")["metrics"]
    assert {name: one["mean"] for name, one in found["bad"]["a"].items()} == dict.fromkeys(FEW)
    assert all(one["mean"] is not None for one in found["images"]["a"].values())


def test_an_interruption_says_how_to_go_on(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    monkeypatch.setattr("vae.evaluation.evaluate.finish", stop)
    with pytest.raises(Stopped, match="interrupted; the same command with name=e goes on") as interrupted:
        evaluate(config_of(tmp_path, images, [model], name="e", probe_images=0))
    assert interrupted.value.code == 130


def test_an_evaluation_goes_on_only_with_the_same_models_images_and_settings(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 6), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e")
    monkeypatch.setattr("vae.evaluation.evaluate.finish", stop)
    with pytest.raises(Stopped):
        evaluate(config)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"name='e': .* holds an interrupted evaluation with other measured"):
        evaluate(replace(config, metrics=["psnr"]))
    saved_model(Path(model), tiny, seed=5)
    with pytest.raises(InputError, match="holds an interrupted evaluation with other models"):
        evaluate(config)
    saved_model(Path(model), tiny)
    evaluate(config)
    with pytest.raises(InputError, match="already holds an evaluation; choose another name"):
        evaluate(config)


def interrupted(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an evaluation that ended before its tables."""
    with monkeypatch.context() as patch:
        patch.setattr("vae.evaluation.evaluate.finish", stop)
        with pytest.raises(Stopped):
            evaluate(config)
    return Path(config.output) / config.name


def test_an_evaluation_does_not_go_on_with_the_same_tensors_in_another_network(tmp_path, tiny, monkeypatch):
    """Half of the images by groups of 4 and half by groups of 8 would be one table of two networks."""
    images, model = pictures(tmp_path / "images", 6), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e", metrics=["psnr"], probe_images=0)
    with monkeypatch.context() as patch:
        patch.setattr("vae.evaluation.evaluate._missing", lambda *_: [0, 1, 2])
        interrupted(config, monkeypatch)
    saved_model(Path(model), replace(tiny, norm_num_groups=8))
    with pytest.raises(InputError, match=r"holds an interrupted evaluation with other models\.a\.config_sha256"):
        evaluate(config)


def test_an_evaluation_does_not_go_on_with_other_code(tmp_path, tiny, monkeypatch):
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e", metrics=["psnr"], probe_images=0)
    interrupted(config, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("vae.evaluation.setup.code_sha256", lambda: "another")
        with pytest.raises(InputError, match=r"holds an interrupted evaluation with other library\.code"):
            evaluate(config)
    evaluate(config)


def test_the_code_is_another_when_one_line_of_it_is(tmp_path):
    for name in ("one.py", "part/two.py", "part/page.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = code_sha256(tmp_path)
    (tmp_path / "part" / "page.html").write_text("2")  # no number depends on it
    (tmp_path / "part" / "__pycache__").mkdir()
    (tmp_path / "part" / "__pycache__" / "two.pyc").write_text("1")
    assert code_sha256(tmp_path) == before
    (tmp_path / "part" / "two.py").write_text("2")
    assert code_sha256(tmp_path) != before
    assert code_sha256() == code_sha256()


def test_an_evaluation_that_an_earlier_version_began_says_that_it_cannot_go_on(tmp_path, tiny, monkeypatch):
    """As that version left it: no code, no configurations, and no pixels in the rows."""
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e", metrics=["psnr"], probe_images=0)
    folder = interrupted(config, monkeypatch)
    plan = read_json(folder / "plan.json")
    plan["library"] = {name: plan["library"][name] for name in ("vae", "torch")}
    del plan["models"]["a"]["config_sha256"]
    (folder / "plan.json").write_text(json.dumps(plan))
    rows = folder / "rows_0.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines() if line]
    rows.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "pixels"}) + "\n" for line in lines))
    told = r"name='e': .* holds what an earlier version of vae began to measure.*choose another name, or delete it"
    with pytest.raises(InputError, match=told):
        evaluate(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"plan\.json: .*not readable as JSON"), ("[]", r"plan\.json: .*not a JSON object"), (None, "no plan.json")],
)
def test_rows_that_nobody_says_the_plan_of_are_not_gone_on_with(tmp_path, tiny, monkeypatch, text, message):
    images, model = pictures(tmp_path / "images", 2), saved_model(tmp_path / "a", tiny)
    config = config_of(tmp_path, images, [model], name="e", metrics=["psnr"], probe_images=0)
    plan = interrupted(config, monkeypatch) / "plan.json"
    plan.unlink() if text is None else plan.write_text(text)
    with pytest.raises(InputError, match=message):
        evaluate(config)
