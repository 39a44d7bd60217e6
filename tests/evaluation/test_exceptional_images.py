"""One corrupt, one NaN-producing, one tiny and one identical image: counted, named, and nobody else's number moves."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import read_json
from tests.evaluation.ranks import config_of, pictures, saved_model
from vae.config.schema import EvaluateConfig
from vae.errors import GATE_FAILED, Stopped
from vae.evaluation.evaluate import evaluate
from vae.evaluation.measure import Evaluator

make = Evaluator.make


def odd(self: Evaluator, images: torch.Tensor, indices: list[int]) -> Iterator:
    """What is white comes back as NaN, what is black as it was."""
    for codec, made in make(self, images, indices):
        if images.min() == 1.0:
            yield codec, made._replace(reconstructions=torch.full_like(images, torch.nan))
        elif images.max() == -1.0:
            yield codec, made._replace(reconstructions=images)
        else:
            yield codec, made


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "images.csv").open() as file:
        return {row["image"]: row for row in csv.DictReader(file)}


@pytest.fixture
def config(tmp_path, tiny, monkeypatch) -> EvaluateConfig:
    monkeypatch.setattr(Evaluator, "make", odd)
    images = pictures(tmp_path / "images", 5)
    return config_of(tmp_path, images, [saved_model(tmp_path / "model", tiny)], name="plain")


def test_each_is_counted_and_named_and_no_other_row_moves(config, tmp_path, capsys):
    plain = rows(evaluate(config))
    images = tmp_path / "images"
    (images / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    Image.new("RGB", (48, 48), "white").save(images / "nan.png")
    Image.new("RGB", (48, 48), "black").save(images / "same.png")
    noise = np.random.default_rng(1).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "tiny.png")
    capsys.readouterr()
    with pytest.raises(
        Stopped, match=r"1 of 9 images are skipped.*corrupt\.png.*1 reconstructions are not finite"
    ) as stop:
        evaluate(replace(config, name="odd"))
    assert stop.value.code == 3
    assert "1 reconstructions are identical and not in the mean PSNR, the first: same.png" in capsys.readouterr().out
    found = rows(tmp_path / "odd")
    assert {name: found[name] for name in plain} == plain
    assert set(found) - set(plain) == {"nan.png", "same.png", "tiny.png"}
    assert (found["nan.png"]["psnr"], found["nan.png"]["flags"]) == ("", "not finite")
    assert (found["same.png"]["psnr"], found["same.png"]["flags"]) == ("inf", "identical")
    assert found["tiny.png"]["flags"] == "enlarged"
    document = read_json(tmp_path / "odd" / "metrics.json")
    (about,) = document["datasets"].values()
    assert about["images"] == 8
    assert [one["image"] for one in about["left_out"]] == ["corrupt.png"]
    assert about["not_finite"] == [{"image": "nan.png", "model": "model"}]
    assert about["identical"] == [{"image": "same.png", "model": "model"}]
    assert about["enlarged"] == ["tiny.png"]
    psnr = document["metrics"]["images"]["model"]["psnr"]
    assert (psnr["images"], psnr["infinite"]) == (6, 1)
    assert (tmp_path / "odd" / "report.html").exists()


def test_what_is_left_out_on_purpose_costs_no_status(config, tmp_path, capsys):
    (tmp_path / "images" / "corrupt.png").write_bytes(b"nothing")
    folder = evaluate(replace(config, name="allowed", allow_skipped=True))
    assert "1 of 6 images are skipped" in capsys.readouterr().out
    assert (folder / "metrics.json").exists()


def test_a_gate_fails_where_most_images_are_not_finite_though_that_is_allowed(config, tmp_path, capsys):
    for number in range(6):
        Image.new("RGB", (48, 48), "white").save(tmp_path / "images" / f"nan {number}.png")
    with pytest.raises(Stopped, match="1 of 1 gates failed") as stop:
        evaluate(replace(config, name="gated", allow_skipped=True, gates={"psnr": 1.0}))
    assert stop.value.code == GATE_FAILED
    said = "images, model: PSNR has no number of every image: 6 of 11 reconstructions are not finite"
    assert said in capsys.readouterr().out


def test_an_evaluation_of_nothing_finite_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(Evaluator, "make", odd)
    (tmp_path / "white").mkdir()
    Image.new("RGB", (48, 48), "white").save(tmp_path / "white" / "nan.png")
    config = config_of(tmp_path, tmp_path / "white", [saved_model(tmp_path / "model", tiny)], name="e")
    with pytest.raises(Stopped, match="1 reconstructions are not finite"):
        evaluate(config)
    assert read_json(tmp_path / "e" / "metrics.json")["metrics"]["white"]["model"]["psnr"]["mean"] is None
