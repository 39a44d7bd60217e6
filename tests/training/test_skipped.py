"""Images that cannot be used in a run: replaced, listed, and too many of them the end of it."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tests.conftest import without_adversary
from tests.training.harness import logged, small_run
from tests.training.images import listed, noise, on, save, with_corrupt_ones
from vae.data.loader import Batch
from vae.data.sources import Skipped
from vae.errors import InputError, Stopped
from vae.training.callbacks import SkippedImages
from vae.training.interruption import StopRequests
from vae.training.manifest import newest_whole
from vae.training.module import AutoencoderModule
from vae.training.train import train


def test_five_in_a_hundred_corrupt_images_of_four_hundred_are_replaced_and_listed_exactly(tmp_path):
    damaged = with_corrupt_ones(tmp_path / "images", 400, 20)
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", batch_size=40)
    config = without_adversary(replace(config, updates=20, validate_every=10))  # two epochs
    folder = train(config)
    assert {row["image"] for row in listed(folder)} == damaged
    assert len(listed(folder)) == 20
    assert all(row["corrupt"] and str(row["image"]) in str(row["reason"]) for row in listed(folder))
    again = train(replace(config, output=str(tmp_path / "again"), data=replace(config.data, workers=2)))
    assert logged(folder) == logged(again)


def test_more_corrupt_images_than_allowed_stop_the_run_with_status_3_and_a_checkpoint(tmp_path):
    with_corrupt_ones(tmp_path / "images", 40, 20)
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
    with_corrupt_ones(tmp_path / "images", 12, 12)
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


def test_a_disk_that_fails_stops_the_run_and_costs_no_image(tmp_path, monkeypatch):
    with_corrupt_ones(tmp_path / "images", 30, 0)
    original = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "007.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InputError, match=r"007\.png: Input/output error; see to the machine"):
        train(replace(on(small_run(tmp_path), tmp_path / "images"), updates=40))
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    monkeypatch.undo()
    train(replace(on(small_run(tmp_path), tmp_path / "images"), updates=40))


def test_a_lone_corrupt_image_of_its_bucket_is_replaced_by_one_that_is_large_enough(tmp_path):
    for number in range(20):
        save(tmp_path / "images" / "train", f"{number}.png", noise(70, 70, number))
    save(tmp_path / "images" / "train", "wide.png", noise(40, 100, 77))
    wide = tmp_path / "images" / "train" / "wide.png"
    wide.write_bytes(wide.read_bytes()[:2000])  # its header is whole
    save(tmp_path / "images" / "val", "a.png", noise(40, 40, 99))
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", bucket_resolutions=[32], batch_size=4)
    folder = train(replace(config, updates=30, validate_every=15))
    assert [row["image"] for row in listed(folder)] == ["wide.png"]


def test_unreadable_images_count_as_corrupt_in_buckets_too(tmp_path):
    for number in range(20):
        save(tmp_path / "images" / "train", f"{number}.png", noise(48, 48, number))
        (tmp_path / "images" / "train" / f"bad{number}.png").write_bytes(b"nothing")
    save(tmp_path / "images" / "val", "a.png", noise(40, 40, 99))
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", bucket_resolutions=[32], max_corrupt=0.1)
    with pytest.raises(Stopped, match=r"data\.max_corrupt"):
        train(config)
    assert all(
        row["corrupt"] and "no image in a format" in str(row["reason"]) for row in listed(tmp_path / "runs" / "run")
    )


def test_a_run_goes_on_after_its_images_were_repaired(tmp_path):
    damaged = with_corrupt_ones(tmp_path / "images", 40, 20)
    config = replace(on(small_run(tmp_path / "runs"), tmp_path / "images", batch_size=8, max_corrupt=0.3), updates=30)
    with pytest.raises(Stopped):
        train(config)
    for name in damaged:
        save(tmp_path / "images" / "train", name, noise(40, 44, int(name[:3])))
    assert train(config) == tmp_path / "runs" / "run"


def test_images_of_one_name_in_training_and_validation_are_both_listed(tmp_path):
    with_corrupt_ones(tmp_path / "images", 20, 0)
    for side in ("train", "val"):
        (tmp_path / "images" / side / "003.png").write_bytes(b"nothing")
    folder = train(on(small_run(tmp_path / "runs"), tmp_path / "images", batch_size=4))
    assert sorted((row["of"], row["image"]) for row in listed(folder)) == [
        ("training", "003.png"),
        ("validation", "003.png"),
    ]


def test_validation_images_none_of_which_can_be_read_are_refused_before_training(tmp_path):
    with_corrupt_ones(tmp_path / "images", 20, 0)
    (tmp_path / "images" / "val" / "a.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of the validation images can be read"):
        train(on(small_run(tmp_path / "runs"), tmp_path / "images"))


def test_processes_count_corrupt_images_together_and_each_once(tmp_path):
    requests = StopRequests(None)
    skipped = SkippedImages(tmp_path, 0.0, 100, requests)
    training = MagicMock(spec=AutoencoderModule)
    others = {f"{number}" for number in range(5, 14)}
    training.process_group = SimpleNamespace(
        all_reduce_max=lambda value: max(value, 1), all_gather=lambda mine: [mine, others]
    )
    mine = [Skipped(f"{number}", "broken", True) for number in range(8)]
    batch = Batch(torch.empty(0), [], [], mine)
    skipped.on_train_batch_start(MagicMock(global_step=0), training, batch, 0)
    assert requests.status == 3  # 14 of at most 10
    assert [row["image"] for row in listed(tmp_path)] == [one.name for one in mine]
    others.clear()
    fewer = SkippedImages(tmp_path, 0.0, 100, StopRequests(None))
    fewer.begin(0, resumed=True)
    fewer.on_train_batch_start(MagicMock(global_step=9), training, batch, 0)
    assert fewer.requests.status == 0
    assert len(listed(tmp_path)) == 8
