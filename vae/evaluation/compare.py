"""Evaluations read back from their files, and two of them paired image by image.

An evaluation is a folder with `metrics.json`, the document, and `images.csv`, the table. Two evaluations are only
paired if they have the same protocol, resolution, data settings and images.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vae.errors import InputError, printable, require
from vae.metrics.registry import PAIRED
from vae.run_dir import RunDir

SCHEMA = 1
DOCUMENT_FILE, TABLE_FILE = "metrics.json", "images.csv"
PIXELS = "pixels"  # column of the table: the hash of the decoded image; early evaluations do not have it
NEEDED = ("schema", "protocol", "resolution", "data", "models", "datasets", "metrics")

Key = tuple[str, int]  # an image's name, and how many images of the same name come before it
Values = tuple[float, ...]  # one value for each of `metrics`, NaN if there is none


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as written: `document` is metrics.json, `tables` the rows of images.csv by dataset and model.

    `pixels` has the hashes of the images by dataset. It has no entry for a dataset whose hashes were not recorded.
    """

    file: Path
    document: dict[str, Any]
    metrics: tuple[str, ...]
    tables: dict[tuple[str, str], dict[Key, Values]]
    pixels: dict[str, dict[Key, str]]

    def columns(self, dataset: str, model: str, keys: list[Key]) -> dict[str, np.ndarray]:
        """Return {metric: (N,) float64} for the images named by `keys`, in their order."""
        table = self.tables[dataset, model]
        values = np.array([table[key] for key in keys], dtype=np.float64).reshape(len(keys), len(self.metrics))
        return dict(zip(self.metrics, values.T, strict=True))

    def mean(self, dataset: str, model: str, metric: str) -> float | None:
        """Return the mean of a metric, or None if the metric was not measured or has no mean."""
        summary = self.document["metrics"][dataset][model].get(metric)
        return None if summary is None else summary["mean"]


@dataclass(frozen=True)
class Pair:
    """One model on one dataset, before and after: columns of the same images in the same order.

    `apart` counts the images that only one of the two evaluations could read.
    """

    dataset: str
    models: tuple[str, str]
    old: dict[str, np.ndarray]
    new: dict[str, np.ndarray]
    apart: int

    @property
    def model(self) -> str:
        """The model's name, or "OLD -> NEW" if the names differ."""
        old, new = self.models
        return old if old == new else f"{old} -> {new}"

    @property
    def metrics(self) -> list[str]:
        """The metrics that have a number in both evaluations."""
        return [name for name in PAIRED if _has_number(self.old, name) and _has_number(self.new, name)]

    def means(self, metric: str) -> tuple[float, float]:
        """Average a metric over the images where both values are finite; NaN if there are none."""
        old, new = self.old[metric], self.new[metric]
        finite = np.isfinite(old) & np.isfinite(new)
        return (float(old[finite].mean()), float(new[finite].mean())) if finite.any() else (math.nan, math.nan)

    @property
    def broken(self) -> int:
        """The number of images that had numbers before and have none now."""
        before, after = (np.isnan(np.stack(list(one.values()))) for one in (self.old, self.new))
        return int((~before.all(axis=0) & after.all(axis=0)).sum())


def whole_models(document: dict[str, Any]) -> list[str]:
    """Return the names of the models whose encoder is paired with its own decoder."""
    return [name for name, about in document["models"].items() if about["encoder"] == about["decoder"]]


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation from its folder or from its metrics.json.

    Raises InputError if the file is missing, is not JSON, is no evaluation, or has another schema.
    """
    path = path.expanduser()
    file = path / DOCUMENT_FILE if path.is_dir() else path
    wanted = f"a folder that vae evaluate wrote, or the {DOCUMENT_FILE} in it"
    if RunDir(path).config.is_file():
        wanted += "; vae compare-runs compares runs"
    require(file.is_file(), f"{path}: no such evaluation", wanted)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file}: not readable as JSON ({error}); name the {DOCUMENT_FILE} of an evaluation"
        ) from error

    is_ours = isinstance(document, dict) and all(key in document for key in NEEDED)
    remedy = f"a {DOCUMENT_FILE} with {', '.join(NEEDED)}: run vae evaluate again"
    require(is_ours, f"{file}: not an evaluation", remedy)
    require(document["schema"] == SCHEMA, f"{file}: schema {document['schema']}", f"{SCHEMA}: run vae evaluate again")
    return Evaluation(file, document, *_read_table(file.with_name(TABLE_FILE)))


def pairs_of(old: Evaluation, new: Evaluation) -> list[Pair]:
    """Pair every dataset and model that both evaluations have.

    Raises InputError if the evaluations cannot be compared.
    """
    _check_comparable(old, new)
    return [_pair(old, new, dataset, models) for dataset in old.document["datasets"] for models in models_of(old, new)]


def models_of(old: Evaluation, new: Evaluation) -> list[tuple[str, str]]:
    """Return (old, new) names of the models to compare: those with equal names, or the only model of each evaluation.

    Raises InputError if there are no such models.
    """
    before, after = (list(one.document["models"]) for one in (old, new))
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    both = [(name, name) for name in before if name in after]
    require(bool(both), f"{new.file}: models {after}", f"one of {before}, or a single model in each evaluation")
    return both


def only_in_one(old: Evaluation, new: Evaluation) -> list[str]:
    """List in sentences the models and metrics that only one of the two evaluations has."""
    lost: list[str] = []
    compared = models_of(old, new)
    for one, number in ((old, 0), (new, 1)):
        known = {pair[number] for pair in compared}
        lost += [f"{name} is in {one.file} only" for name in one.document["models"] if name not in known]

    # Early documents have no `measured`: the columns of their tables stand in for it.
    measured = [set(one.document.get("measured", one.metrics)) for one in (old, new)]
    lost += [f"{name} is measured in {old.file} only" for name in sorted(measured[0] - measured[1])]
    return lost + [f"{name} is measured in {new.file} only" for name in sorted(measured[1] - measured[0])]


def paired_by_name(old: Evaluation, new: Evaluation) -> list[str]:
    """List in sentences the datasets whose images are paired by name only.

    This is so if an evaluation has no hashes of the pixels: nobody can tell then whether the images are equal.
    """
    said: list[str] = []
    for dataset in old.document["datasets"]:
        silent = [str(one.file) for one in (old, new) if not one.pixels.get(dataset)]
        if silent:
            why = f"{silent[0]} holds no hashes of their pixels, as of an earlier version of vae"
            said.append(f"images of {dataset} are paired by name only: {why}; run vae evaluate again to be sure")
    return said


def _pair(old: Evaluation, new: Evaluation, dataset: str, models: tuple[str, str]) -> Pair:
    """Pair one dataset and one model; raises InputError if the evaluations have no image in common."""
    before, after = old.tables.get((dataset, models[0]), {}), new.tables.get((dataset, models[1]), {})
    keys = [key for key in before if key in after]
    if not keys:
        raise InputError(f"{new.file}: no image of {dataset} in {TABLE_FILE} is in both evaluations; run them again")
    columns = old.columns(dataset, models[0], keys), new.columns(dataset, models[1], keys)
    return Pair(dataset, models, *columns, apart=len(before) + len(after) - 2 * len(keys))


def _check_comparable(old: Evaluation, new: Evaluation) -> None:
    """Raise InputError unless protocol, resolution, data settings, datasets and images agree."""
    before, after = old.document, new.document
    same = before["protocol"]["sha256"] == after["protocol"]["sha256"]
    protocols = [f"{one['protocol']['name']} ({one['protocol']['sha256']})" for one in (before, after)]
    require(
        same, f"{new.file}: protocol {protocols[1]}", f"that of {old.file}, {protocols[0]}: numbers differ by protocol"
    )

    sides = before["resolution"], after["resolution"]
    require(sides[0] == sides[1], f"{new.file}: resolution={sides[1]}", f"{sides[0]}, that of {old.file}")

    data = before["data"], after["data"]
    require(data[0] == data[1], f"{new.file}: data {data[1]}", f"{data[0]}, as in {old.file}")

    names = list(before["datasets"]), list(after["datasets"])
    require(set(names[0]) == set(names[1]), f"{new.file}: datasets {names[1]}", f"those of {old.file}, {names[0]}")

    for name in before["datasets"]:
        _check_images(old, new, name)


def _check_images(old: Evaluation, new: Evaluation, dataset: str) -> None:
    """Raise InputError unless both evaluations measured the same images.

    Images are compared by the hashes of their pixels if both evaluations have them, and else by the list of names and
    file sizes.
    """
    before, after = (one.pixels.get(dataset, {}) for one in (old, new))
    others = [key[0] for key, hashed in after.items() if before.get(key, hashed) != hashed]
    if others:
        wrong = f"{len(others)} images of {dataset} have the names of those of {old.file} and other pixels"
        remedy = "measure both on the same files, by models of as many channels"
        raise InputError(f"{new.file}: {wrong}, the first {printable(others[0])}; {remedy}")

    # The hash of the list depends on file sizes too. These do not matter if all pixels are known to be equal.
    about, other = (one.document["datasets"][dataset] for one in (old, new))
    are_the_same = bool(before) and before.keys() == after.keys()
    counts = [f"{one['images']} images, list {one['sha256'][:12]}" for one in (about, other)]
    given = f"{new.file}: {dataset} with {counts[1]}"
    expected = f"the images of {old.file} ({counts[0]}): only the same images can be paired"
    require(are_the_same or about["sha256"] == other["sha256"], given, expected)


class _Table(NamedTuple):
    """The contents of images.csv, as the fields of `Evaluation` hold them."""

    metrics: tuple[str, ...]
    tables: dict[tuple[str, str], dict[Key, Values]]
    pixels: dict[str, dict[Key, str]]


def _read_table(file: Path) -> _Table:
    """Read images.csv. Raises InputError if it is missing or is no table of an evaluation."""
    require(file.is_file(), f"{file}: missing", f"the table beside {DOCUMENT_FILE}")
    tables: dict[tuple[str, str], dict[Key, Values]] = {}
    pixels: dict[str, dict[Key, str]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    metrics: tuple[str, ...] = ()

    for row in _lines(file):
        metrics = metrics or tuple(name for name in row if name in PAIRED)
        try:
            dataset, image, model = row["dataset"], row["image"], row["model"]
            values = tuple(math.nan if row[name] == "" else float(row[name]) for name in metrics)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: not a table of an evaluation ({error}); run vae evaluate again") from error

        # Several images of a dataset may have one name: their order tells them apart.
        key = image, seen[dataset, model, image]
        tables.setdefault((dataset, model), {})[key] = values
        if row.get(PIXELS):
            pixels.setdefault(dataset, {})[key] = row[PIXELS]
        seen[dataset, model, image] += 1
    return _Table(metrics, tables, pixels)


def _lines(file: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the CSV file. Raises InputError if it is not readable as CSV."""
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            yield from csv.DictReader(text)
    except csv.Error as error:
        raise InputError(f"{file}: not readable as CSV ({error}); run vae evaluate again") from error


def _has_number(columns: dict[str, np.ndarray], metric: str) -> bool:
    """Tell whether the metric has a number for at least one image."""
    return metric in columns and not bool(np.isnan(columns[metric]).all())
