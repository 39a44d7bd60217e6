"""An evaluation read back from its files, and two of them put side by side, image by image."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vae.errors import InputError, require
from vae.metrics.registry import PAIRED

SCHEMA = 1
DOCUMENT_FILE, TABLE_FILE = "metrics.json", "images.csv"
NEEDED = ("schema", "protocol", "resolution", "data", "models", "datasets", "metrics")

Key = tuple[str, int]  # an image's name, and how many of that name came before it
Values = tuple[float, ...]  # one for each of `metrics`, NaN where there is none


@dataclass(frozen=True)
class Evaluation:
    """What was written: `document` is metrics.json, `tables` the lines of images.csv by dataset and model."""

    file: Path
    document: dict[str, Any]
    metrics: tuple[str, ...]
    tables: dict[tuple[str, str], dict[Key, Values]]

    def columns(self, dataset: str, model: str, keys: list[Key]) -> dict[str, np.ndarray]:
        """{metric: (N,) float64} of the named images."""
        table = self.tables[dataset, model]
        values = np.array([table[key] for key in keys], dtype=np.float64).reshape(len(keys), len(self.metrics))
        return dict(zip(self.metrics, values.T, strict=True))

    def mean(self, dataset: str, model: str, metric: str) -> float | None:
        summary = self.document["metrics"][dataset][model].get(metric)
        return None if summary is None else summary["mean"]


@dataclass(frozen=True)
class Pair:
    """One model on one dataset, before and after: columns of the same images in the same order.

    `apart` counts the images that only one of the two could read.
    """

    dataset: str
    models: tuple[str, str]
    old: dict[str, np.ndarray]
    new: dict[str, np.ndarray]
    apart: int

    @property
    def model(self) -> str:
        old, new = self.models
        return old if old == new else f"{old} -> {new}"

    @property
    def metrics(self) -> list[str]:
        """Those that both have a number of."""
        return [name for name in PAIRED if _has_number(self.old, name) and _has_number(self.new, name)]

    def means(self, metric: str) -> tuple[float, float]:
        """Over the images where both are finite; NaN where there are none."""
        old, new = self.old[metric], self.new[metric]
        finite = np.isfinite(old) & np.isfinite(new)
        return (float(old[finite].mean()), float(new[finite].mean())) if finite.any() else (math.nan, math.nan)

    @property
    def broken(self) -> int:
        """Images that had numbers before and have none now."""
        before, after = (np.isnan(np.stack(list(one.values()))) for one in (self.old, self.new))
        return int((~before.all(axis=0) & after.all(axis=0)).sum())


def whole_models(document: dict[str, Any]) -> list[str]:
    """The models whose encoder meets its own decoder."""
    return [name for name, about in document["models"].items() if about["encoder"] == about["decoder"]]


def read_evaluation(path: Path) -> Evaluation:
    """Of a folder or its metrics.json."""
    path = path.expanduser()
    file = path / DOCUMENT_FILE if path.is_dir() else path
    require(
        file.is_file(), f"{path}: no such evaluation", f"a folder that evaluate.py wrote, or the {DOCUMENT_FILE} in it"
    )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file}: not readable as JSON ({error}); name the {DOCUMENT_FILE} of an evaluation"
        ) from error
    is_ours = isinstance(document, dict) and all(key in document for key in NEEDED)
    require(is_ours, f"{file}: not an evaluation", f"a {DOCUMENT_FILE} with {', '.join(NEEDED)}: run evaluate.py again")
    require(document["schema"] == SCHEMA, f"{file}: schema {document['schema']}", f"{SCHEMA}: run evaluate.py again")
    metrics, tables = _read_table(file.with_name(TABLE_FILE))
    return Evaluation(file, document, metrics, tables)


def pairs_of(old: Evaluation, new: Evaluation) -> list[Pair]:
    """Every dataset and model of both; evaluations that cannot be compared are refused."""
    _check_comparable(old, new)
    return [_pair(old, new, dataset, models) for dataset in old.document["datasets"] for models in models_of(old, new)]


def models_of(old: Evaluation, new: Evaluation) -> list[tuple[str, str]]:
    """The models of the same name, or the only one of each."""
    before, after = (list(one.document["models"]) for one in (old, new))
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    both = [(name, name) for name in before if name in after]
    require(bool(both), f"{new.file}: models {after}", f"one of {before}, or a single model in each evaluation")
    return both


def only_in_one(old: Evaluation, new: Evaluation) -> list[str]:
    """Models and metrics that cannot be compared, in words."""
    lost: list[str] = []
    compared = models_of(old, new)
    for one, number in ((old, 0), (new, 1)):
        known = {pair[number] for pair in compared}
        lost += [f"{name} is in {one.file} only" for name in one.document["models"] if name not in known]
    measured = [set(one.document.get("measured", one.metrics)) for one in (old, new)]
    lost += [f"{name} is measured in {old.file} only" for name in sorted(measured[0] - measured[1])]
    return lost + [f"{name} is measured in {new.file} only" for name in sorted(measured[1] - measured[0])]


def _pair(old: Evaluation, new: Evaluation, dataset: str, models: tuple[str, str]) -> Pair:
    before, after = old.tables.get((dataset, models[0]), {}), new.tables.get((dataset, models[1]), {})
    keys = [key for key in before if key in after]
    if not keys:
        raise InputError(f"{new.file}: no image of {dataset} in {TABLE_FILE} is in both evaluations; run them again")
    columns = old.columns(dataset, models[0], keys), new.columns(dataset, models[1], keys)
    return Pair(dataset, models, *columns, apart=len(before) + len(after) - 2 * len(keys))


def _check_comparable(old: Evaluation, new: Evaluation) -> None:
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
    for name, about in before["datasets"].items():
        other = after["datasets"][name]
        counts = [f"{one['images']} images, list {one['sha256'][:12]}" for one in (about, other)]
        given = f"{new.file}: {name} with {counts[1]}"
        expected = f"the images of {old.file} ({counts[0]}): only the same images can be paired"
        require(about["sha256"] == other["sha256"], given, expected)


def _read_table(file: Path) -> tuple[tuple[str, ...], dict[tuple[str, str], dict[Key, Values]]]:
    require(file.is_file(), f"{file}: missing", f"the table beside {DOCUMENT_FILE}")
    tables: dict[tuple[str, str], dict[Key, Values]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    metrics: tuple[str, ...] = ()
    for row in _lines(file):
        metrics = metrics or tuple(name for name in row if name in PAIRED)
        try:
            dataset, image, model = row["dataset"], row["image"], row["model"]
            values = tuple(math.nan if row[name] == "" else float(row[name]) for name in metrics)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: not a table of an evaluation ({error}); run evaluate.py again") from error
        tables.setdefault((dataset, model), {})[image, seen[dataset, model, image]] = values
        seen[dataset, model, image] += 1
    return metrics, tables


def _lines(file: Path) -> Iterator[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            yield from csv.DictReader(text)
    except csv.Error as error:
        raise InputError(f"{file}: not readable as CSV ({error}); run evaluate.py again") from error


def _has_number(columns: dict[str, np.ndarray], metric: str) -> bool:
    return metric in columns and not bool(np.isnan(columns[metric]).all())
