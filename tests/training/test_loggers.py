"""What TensorBoard's and Weights & Biases' own libraries read of a run: the steps of metrics.csv, values, pictures."""

import csv
import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import without_adversary
from vae.config.schema import WandbConfig
from vae.training.loggers import hyperparameters
from vae.training.train import train

Values = dict[str, dict[int, float]]


def in_metrics_file(run: Path) -> Values:
    """Values of metrics.csv by name and update."""
    values: Values = defaultdict(dict)
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            updates = int(row.pop("updates"))
            for name, value in row.items():
                if value:
                    values[name][updates] = float(value)
    return values


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def in_events(events: EventAccumulator) -> Values:
    return {name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]}


def agree(theirs: Values, ours: Values) -> None:
    assert {name: sorted(steps) for name, steps in theirs.items()} == {n: sorted(steps) for n, steps in ours.items()}
    for name, steps in theirs.items():
        assert list(steps.values()) == pytest.approx([ours[name][step] for step in steps], rel=1e-6), name


def test_tensorboard_has_the_steps_values_pictures_and_the_configuration_of_the_run(tiny_run):
    """D7: its steps were 9, 19, 29 where metrics.csv has 10, 20, 30, and its hparams.yaml was empty."""
    config = without_adversary(replace(tiny_run, logger="tensorboard", threads=1))
    run = train(config)
    events = read_events(run)
    agree(in_events(events), in_metrics_file(run))

    assert [one.step for one in events.Images("val/reconstructions")] == [0, 4, 8]
    assert yaml.safe_load((run / "tensorboard" / "hparams.yaml").read_text()) == hyperparameters(config)


def test_tensorboard_forgets_the_updates_that_a_resumed_run_makes_again(tiny_run):
    config = without_adversary(replace(tiny_run, logger="tensorboard", threads=1))
    run = train(replace(config, updates=4))
    before = sorted(in_metrics_file(run)["train/pixel"])
    train(replace(config, resume=str(run)))
    values = in_events(read_events(run))["train/pixel"]
    assert sorted(values) == sorted(in_metrics_file(run)["train/pixel"])
    assert max(values) == 8
    assert set(before) <= set(values)


BLOCK = 32768  # bytes; the file is a log of LevelDB's form


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: wandb's own reader of it is no longer in the Python package."""
    data = file.read_bytes()
    place = 7  # a header of the file
    parts = b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # no place for the header of a record: the block is filled up
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield parts
            parts = b""


def items_of(items: Iterable[Any]) -> dict[str, Any]:
    return {"/".join((one.key, *one.nested_key)).strip("/"): json.loads(one.value_json) for one in items}


class Offline:
    """What `wandb sync` would send of an offline run."""

    def __init__(self, run: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        self.values: Values = defaultdict(dict)
        self.configured: dict[str, Any] = {}
        self.pictures: dict[int, Path] = {}
        self.run: Any = None

        (folder,) = (run / "wandb").glob("offline-run-*")
        (file,) = folder.glob("run-*.wandb")
        for data in records(file):
            record: Any = vars(wandb_internal_pb2)["Record"]()
            record.ParseFromString(data)
            if record.run.run_id:
                self.run = record.run
            self.configured |= items_of(record.config.update) | items_of(record.run.config.update)
            self._add(items_of(record.history.item), folder)

    def _add(self, row: dict[str, Any], folder: Path) -> None:
        step = row.get("trainer/global_step", -1)
        for name, value in row.items():
            picture, slash, fact = name.rpartition("/")
            if slash and picture == "val/reconstructions":
                self.pictures |= {step: folder / "files" / value} if fact == "path" else {}
            elif name != "trainer/global_step" and not name.startswith("_"):
                self.values[name][step] = value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_has_the_steps_values_pictures_and_the_configuration_without_a_warning(
    tiny_run, monkeypatch, capfd
):
    """D7: the run had no configuration, and two warnings of wandb's opened it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    named = WandbConfig(project="faces", entity="team", group="first tries", tags=["f8", "small"], notes="It's (mine)")
    config = without_adversary(replace(tiny_run, logger="wandb", wandb=named, threads=1))
    run = train(config)
    assert "WARNING" not in capfd.readouterr().err

    sent = Offline(run)
    agree(sent.values, in_metrics_file(run))
    assert sorted(sent.pictures) == [0, 4, 8]
    for step, file in sent.pictures.items():
        ours = Image.open(run / "reconstructions" / f"step_{step:07d}.png")
        assert Image.open(file).tobytes() == ours.tobytes()

    assert {key: sent.configured[key] for key in hyperparameters(config)} == hyperparameters(config)
    assert (sent.run.project, sent.run.entity, sent.run.run_group) == ("faces", "team", "first tries")
    assert (list(sent.run.tags), sent.run.notes, sent.run.display_name) == (["f8", "small"], "It's (mine)", run.name)
