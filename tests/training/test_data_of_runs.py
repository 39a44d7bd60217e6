"""Whole runs on data as they are: of forty sizes, partly corrupt, grey, with alpha, of many channels, of 16 bits."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import read_json, without_adversary
from tests.training.harness import small_run
from tests.training.test_processes import of_processes, outcome, run
from vae.config import TrainConfig
from vae.data.buckets import bucket_shapes, lost_area
from vae.data.config import DataConfig
from vae.data.images import image_size
from vae.data.sources import Source
from vae.errors import InputError, Stopped
from vae.training.manifest import newest_whole
from vae.training.run import train


def noise(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(folder: Path, name: str, values: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(folder / name)


def on(config: TrainConfig, root: Path, **data: object) -> TrainConfig:
    """`config` on a folder, validated on what lies in its `val`."""
    chosen = DataConfig(source="folder", root=str(root), resolution=32, batch_size=2, workers=0)
    return replace(config, data=replace(chosen, **data))


@pytest.fixture
def of_forty_sizes(tmp_path: Path) -> Path:
    aspects = np.exp(np.linspace(-0.9, 0.9, 40))
    for number, aspect in enumerate(aspects):
        height, width = round((60 + number) * aspect**0.5), round((60 + number) / aspect**0.5)
        save(tmp_path / "images" / "train", f"{number}.png", noise(height, width, number))
    save(tmp_path / "images" / "val", "a.png", noise(40, 50, 100))
    save(tmp_path / "images" / "val", "b.png", noise(50, 40, 101))
    return tmp_path / "images"


def test_forty_sizes_train_on_two_processes_in_batches_of_one_shape_each(tmp_path, of_forty_sizes):
    buckets = {"bucket_resolutions": [32, 48], "bucket_loss": 0.15}
    config = replace(on(small_run(tmp_path), of_forty_sizes, **buckets), updates=24, validate_every=12, name="run")
    folder = run(of_processes(config, 2))
    ranks = [outcome(folder, rank) for rank in range(2)]
    assert ranks[0]["sha256"] == ranks[1]["sha256"]
    assert ranks[0]["shapes"] == ranks[1]["shapes"]
    allowed = {shape for side in (32, 48) for shape in bucket_shapes(side, 0.15, 2)}
    seen = {(height, width) for _, _, height, width in ranks[0]["shapes"]}
    assert seen <= allowed
    assert len(seen) > 8
    for rank in ranks:
        for number, (_, _, height, width) in enumerate(rank["shapes"]):
            for name in rank["names"][2 * number : 2 * number + 2]:
                size = np.array(image_size(of_forty_sizes / "train" / name))[None]
                assert lost_area(size, (height, width))[0] <= 0.15
    print(f"{len(seen)} shapes in {len(ranks[0]['shapes'])} batches of two processes")


def test_compiling_and_buckets_are_refused_together(of_forty_sizes, tmp_path):
    with pytest.raises(InputError, match=r"compile=true with data\.bucket_resolutions"):
        replace(on(small_run(tmp_path), of_forty_sizes, bucket_resolutions=[32]), compile=True)


def _with_corrupt_ones(folder: Path, whole: int, corrupt: int) -> set[str]:
    for number in range(whole):
        save(folder / "train", f"{number:03}.png", noise(40, 44, number))
    save(folder / "val", "a.png", noise(40, 40, 999))
    damaged = {f"{number:03}.png" for number in np.random.default_rng(3).choice(whole, corrupt, replace=False)}
    for name in damaged:
        data = (folder / "train" / name).read_bytes()
        (folder / "train" / name).write_bytes(data[: len(data) // 2])
    return damaged


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_five_in_a_hundred_corrupt_images_of_four_hundred_are_replaced_and_listed_exactly(tmp_path):
    damaged = _with_corrupt_ones(tmp_path / "images", 400, 20)
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", batch_size=40)
    config = without_adversary(replace(config, updates=20, validate_every=10))  # two epochs
    folder = train(config)
    assert {row["image"] for row in listed(folder)} == damaged
    assert len(listed(folder)) == 20
    assert all(row["corrupt"] and str(row["image"]) in str(row["reason"]) for row in listed(folder))
    again = train(replace(config, output=str(tmp_path / "again"), data=replace(config.data, workers=2)))
    losses = [(path / "metrics.csv").read_text() for path in (folder, again)]
    assert losses[0] == losses[1]


def test_more_corrupt_images_than_allowed_stop_the_run_with_status_3_and_a_checkpoint(tmp_path):
    _with_corrupt_ones(tmp_path / "images", 40, 20)
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", batch_size=8, max_corrupt=0.3)
    with pytest.raises(Stopped, match=r"data\.max_corrupt") as stop:
        train(replace(config, updates=100, validate_every=100))
    assert stop.value.code == 3
    folder = tmp_path / "runs" / "run"
    newest_whole(folder / "checkpoints")
    assert 12 < len(listed(folder)) <= 20
    before = {row["image"] for row in listed(folder)}
    train(replace(config, updates=12, validate_every=6, data=replace(config.data, max_corrupt=0.6)))
    assert len(listed(folder)) == len({row["image"] for row in listed(folder)}) >= len(before)


def test_nothing_but_corrupt_images_is_an_error_at_once(tmp_path):
    _with_corrupt_ones(tmp_path / "images", 12, 12)
    with pytest.raises(InputError, match=r"100 images in a row cannot be used, the last: .*png"):
        train(on(small_run(tmp_path / "runs"), tmp_path / "images"))


def test_images_too_small_are_left_out_of_training_unless_they_may_be_enlarged(tmp_path):
    for number in range(12):
        save(tmp_path / "images" / "train", f"{number}.png", noise(20 + 4 * number, 70, number))
    save(tmp_path / "images" / "val", "a.png", noise(16, 20, 99))
    folder = train(on(small_run(tmp_path / "runs"), tmp_path / "images"))
    assert {row["image"] for row in listed(folder)} == {"0.png", "1.png", "2.png"}
    assert not any(row["corrupt"] for row in listed(folder))
    enlarged = train(on(small_run(tmp_path / "enlarged"), tmp_path / "images", min_side=1))
    assert not (enlarged / "skipped.jsonl").exists()


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (4, 8), (6, 8), (3, 16), (1, 16)])
def test_images_of_other_channels_and_depths_train_and_are_pictured(tmp_path, channels, bits):
    depth = {8: np.uint8, 16: np.uint16}[bits]
    for side, count in (("train", 8), ("val", 2)):
        (tmp_path / "images" / side).mkdir(parents=True)
        for number in range(count):
            high = 256 if bits == 8 else 65536
            values = np.random.default_rng(number).integers(0, high, (40, 48, channels)).astype(depth)
            np.save(tmp_path / "images" / side / f"{number}.npy", values)
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", bits=bits, colour=0.1 if channels in (1, 3) else 0.0)
    model = replace(config.model, in_channels=channels, out_channels=channels)
    weights = replace(config.loss.weights, perceptual=0.5)
    loss = replace(config.loss, weights=weights, perceptual_net="alex", augment=[])
    folder = train(replace(config, model=model, loss=loss, updates=6))
    assert read_json(folder / "config.json")["data"]["bits"] == bits
    with Image.open(next((folder / "reconstructions").glob("*6.png"))) as picture:
        assert picture.mode == "RGB"


class Drawn(Source):
    """Six lines of one's own: grey ramps, made when they are asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def read(self, index: int) -> Tensor:
        return (torch.arange(48 * 40).view(1, 40, 48) * (index + 1) % 256).to(torch.uint8)


def test_a_source_of_ones_own_trains_and_resumes_by_its_names(tmp_path):
    config = replace(small_run(tmp_path), updates=6)
    sources = Drawn([f"{number}" for number in range(9)]), Drawn(["a", "b"])
    folder = train(config, sources)
    assert train(replace(config, updates=9), sources) == folder
    with pytest.raises(InputError, match="added, removed or renamed"):
        train(replace(config, updates=12), (Drawn(["x", *sources[0].names]), sources[1]))


def test_a_disk_that_fails_stops_the_run_and_costs_no_image(tmp_path, of_forty_sizes, monkeypatch):
    original = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "7.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InputError, match=r"7\.png: Input/output error; see to the machine"):
        train(replace(on(small_run(tmp_path), of_forty_sizes), updates=40))
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    monkeypatch.undo()
    train(replace(on(small_run(tmp_path), of_forty_sizes), updates=40))
