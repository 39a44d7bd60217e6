"""Images that cannot be read: never replaced, listed and excluded, and the status says so."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import read_json
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.errors import InputError, Stopped
from vae.evaluation.evaluate import evaluate
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder


@pytest.fixture
def config(tmp_path, tiny) -> EvaluateConfig:
    torch.manual_seed(0)
    save_autoencoder(AutoencoderKL(tiny), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
    data = DataConfig(
        root=str(tmp_path / "images"), resolution=32, workers=0, validation_fraction=1.0, validation_batch_size=2
    )
    return EvaluateConfig(
        model=str(tmp_path / "model"), name="whole", output=str(tmp_path), metrics=["psnr"], probe_images=0, data=data
    )


def rows(folder: Path) -> dict[str, str]:
    with (folder / "images.csv").open() as file:
        return {row["image"]: row["psnr"] for row in csv.DictReader(file)}


def damage(config: EvaluateConfig, *names: str) -> None:
    for name in names:
        (Path(str(config.data.root)) / name).write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")


def test_an_image_that_cannot_be_read_is_excluded_and_named_and_changes_no_other_row(config, tmp_path):
    whole = rows(evaluate(config))
    damage(config, "2.png", "3.png")
    with pytest.raises(Stopped, match=r"2 of 5 images are skipped.*2\.png") as stop:
        evaluate(replace(config, name="damaged"))
    assert stop.value.code == 3
    readable = {name: value for name, value in whole.items() if name not in ("2.png", "3.png")}
    assert rows(tmp_path / "damaged") == readable
    document = read_json(tmp_path / "damaged" / "metrics.json")
    about = document["datasets"]["images"]
    assert about["images"] == 3
    assert [one["image"] for one in about["left_out"]] == ["2.png", "3.png"]
    assert evaluate(replace(config, name="allowed", allow_skipped=True)) == tmp_path / "allowed"


def test_with_no_image_that_can_be_read_nothing_is_written(config, tmp_path):
    damage(config, *(f"{number}.png" for number in range(5)))
    with pytest.raises(InputError, match=r"none of 5 images of images can be read, the first: .*0\.png"):
        evaluate(config)
    assert not (tmp_path / "whole" / "metrics.json").exists()


def test_small_images_are_measured_enlarged_unless_min_side_leaves_them_out(config):
    small = np.random.default_rng(9).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(small).save(Path(str(config.data.root)) / "small.png")
    assert "small.png" in rows(evaluate(config))
    filtered = replace(config, name="filtered", data=replace(config.data, min_side=32))
    assert "small.png" not in rows(evaluate(filtered))


def test_a_name_that_is_no_text_is_measured_and_written(config, tmp_path):
    odd = os.fsencode(str(config.data.root)) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((Path(str(config.data.root)) / "1.png").read_bytes())
    folder = evaluate(config)
    assert b"caf\xe9.png" in (folder / "images.csv").read_bytes()
    damage(config, os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(Stopped, match=r"caf\\udce9\.png"):
        evaluate(replace(config, name="damaged"))
