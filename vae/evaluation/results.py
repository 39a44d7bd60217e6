"""What is measured of each image, on disk as soon as it is known: a rerun goes on from there.

All rows of an evaluation in the order of the images, whoever measured them and when.

`metrics.json` and `images.csv`: all that an evaluation found, in plain numbers."""

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vae.errors import InputError
from vae.evaluation.compare import PIXELS, whole_models
from vae.evaluation.latents import combine
from vae.evaluation.statistics import FEWEST, QUANTILE, compare_pairs, summarise
from vae.metrics.registry import CONVENTION_OF, OF_SETS, PAIRED
from vae.metrics.set_distances import frechet_distance, kernel_estimate

Line = dict[str, Any]  # of one image: dataset, index, image, and left_out or what each model made of it
Key = tuple[str, int]  # dataset, index


class Rows:
    """`rows_RANK.jsonl` of this process; those of all are read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._path = folder, folder / f"rows_{rank}.jsonl"

    def begin(self) -> None:
        """After a kill the last line may be cut: what follows begins a line of its own."""
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            shared = "output= must be one folder that all processes share"
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); {shared}") from error
        if self._file.tell():
            self._file.write(b"\n")

    def add(self, line: Line) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); make room, then go on") from error

    def end(self) -> None:
        self._file.close()

    def read(self) -> Iterator[Line]:
        """The whole lines of all processes, in no order."""
        for path in sorted(self.folder.glob("rows_*.jsonl")):
            with path.open("rb") as file:
                for text in file:
                    if (line := _parsed(text)) is not None:
                        yield line

    def are_there(self) -> bool:
        """Of any process, from before."""
        return any(self.folder.glob("rows_*.jsonl"))

    def known(self) -> set[Key]:
        """Of images that were measured; what could not be read may have been repaired."""
        return {key_of(line) for line in self.read() if "left_out" not in line}

    def forget(self) -> None:
        for path in self.folder.glob("rows_*.jsonl"):
            path.unlink()


def key_of(line: Line) -> Key:
    return line["dataset"], line["index"]


def packed(array: np.ndarray) -> list[Any]:
    """An array as JSON: dtype, shape, and its bytes in base64."""
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def unpacked(given: list[Any]) -> np.ndarray:
    dtype, shape, data = given
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None  # a kill cut it
    return line if isinstance(line, dict) else None


Vectors = dict[str, np.ndarray]
ORIGINAL = ""  # in the place of a model's name: the images themselves


@dataclass
class Collected:
    """Of one data set: lines by index without what was packed into them, and that, as arrays."""

    lines: list[Line] = field(default_factory=list)  # of images that were measured
    left_out: list[Line] = field(default_factory=list)
    features: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)  # model -> convention -> per image
    latents: dict[str, list[Vectors]] = field(default_factory=dict)  # model -> per image

    def column(self, model: str, metric: str) -> np.ndarray:
        """A value per image: NaN where there is none, be it that it does not apply or that an image is not finite."""
        values = (line["models"][model].get("metrics", {}).get(metric) for line in self.lines)
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)

    def of_both(self, model: str, convention: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) of images and of their reconstructions, of those images whose reconstruction is finite."""
        if not any(line["models"][model]["is_finite"] for line in self.lines):
            return np.zeros((0, 0)), np.zeros((0, 0))
        both = zip(self.features[ORIGINAL][convention], self.lines, strict=True)
        originals = [features for features, line in both if line["models"][model]["is_finite"]]
        return np.stack(originals), np.stack(self.features[model][convention])


def collect(lines: Iterable[Line], datasets: Sequence[str], models: Sequence[str]) -> dict[str, Collected]:
    """A line of every image, in the order of data sets and indices; one that was measured before one left out."""
    order = {name: number for number, name in enumerate(datasets)}
    found: dict[tuple[int, int], Line] = {}
    for line in lines:
        key = order[line["dataset"]], line["index"]
        if key not in found or "left_out" in found[key]:
            found[key] = _unpacked(line)
    collected = {name: Collected() for name in datasets}
    for key in sorted(found):
        line = found.pop(key)
        _take(collected[line["dataset"]], line, models)
    return collected


def _unpacked(line: Line) -> Line:
    """With its arrays as they were: their text is a third larger and would stay in memory with them."""
    for packed in [line, *line.get("models", {}).values()]:
        for kind in ("features", "latents"):
            if kind in packed:
                packed[kind] = {name: unpacked(value) for name, value in packed[kind].items()}
    return line


def _take(into: Collected, line: Line, models: Sequence[str]) -> None:
    if "left_out" in line:
        into.left_out.append(line)
        return
    _add(into.features.setdefault(ORIGINAL, {}), line.pop("features"))
    for name in models:
        result: dict[str, Any] = line["models"][name]
        _add(into.features.setdefault(name, {}), result.pop("features", {}))
        if "latents" in result:
            into.latents.setdefault(name, []).append(result.pop("latents"))
    into.lines.append(line)


def _add(into: dict[str, list[np.ndarray]], features: Vectors) -> None:
    for convention, values in features.items():
        into.setdefault(convention, []).append(values)


Document = dict[str, Any]
Row = dict[str, Any]  # dataset, index, image, pixels (their hash), model, metrics, flags


def of_dataset(collected: Collected, header: Document) -> Document:
    """The parts of the document about one data set: images, metrics, comparisons, latents."""
    models = list(header["models"])
    pairs = [name for name in header["measured"] if name in PAIRED]
    sets = [name for name in header["measured"] if name in OF_SETS]
    columns = {model: {name: collected.column(model, name) for name in pairs} for model in models}
    metrics: dict[str, dict[str, Any]] = {}
    for model in models:
        metrics[model] = {name: summarise(values) for name, values in columns[model].items()}
        metrics[model] |= {name: _of_set(collected, model, name) for name in sets}
        metrics[model] |= dict.fromkeys(header["missing"])
    return {
        "images": _about_images(collected, models),
        "metrics": metrics,
        "comparisons": [row for pairs in _asked(header) for row in compare_pairs(columns, pairs)],
        "latents": {
            model: combine(vectors, is_tiny=header["models"][model].get("architecture") == "tiny")
            for model, vectors in collected.latents.items()
        },
    }


def rows_of(dataset: str, collected: Collected, models: list[str]) -> Iterator[Row]:
    """One for each image and model."""
    for line in collected.lines:
        for model in models:
            result = line["models"][model]
            flags = ["enlarged"] if line["enlarged"] else []
            flags += [] if result["is_finite"] else ["not finite"]
            flags += ["identical"] if result.get("is_identical") else []
            numbers = {name: _number(value) for name, value in result.get("metrics", {}).items()}
            about = {name: line[name] for name in ("index", "image", "pixels")}
            yield {"dataset": dataset, "model": model, "metrics": numbers, "flags": flags} | about


def as_csv(rows: list[Row], header: Document) -> str:
    """A line for each image and model; empty where there is no value. `pixels` tell the image from another's name."""
    pairs = [name for name in header["measured"] if name in PAIRED]
    protocol = f"{header['protocol']['name']} {header['protocol']['sha256']}"
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["dataset", "image", "model", *pairs, "flags", "protocol", PIXELS])
    for row in rows:
        values = (row["metrics"].get(name) for name in pairs)
        cells = ["" if value is None else repr(value) for value in values]
        about = [" ".join(row["flags"]), protocol, row["pixels"]]
        writer.writerow([row["dataset"], row["image"], row["model"], *cells, *about])
    return text.getvalue()


def _asked(header: Document) -> list[list[tuple[str, str]]]:
    """Two questions: whole models with each other; a crossed encoder with its own decoder."""
    models, whole = header["models"], whole_models(header)
    own = {models[name]["encoder"]: name for name in whole}
    crossed = [(own[about["encoder"]], name) for name, about in models.items() if name not in whole]
    return [list(combinations(whole, 2)), crossed]


def _number(value: float | str | None) -> float | None:
    """None too where a metric does not apply."""
    return None if value is None or math.isnan(float(value)) else float(value)


def _of_set(collected: Collected, model: str, metric: str) -> Mapping[str, Any]:
    images, reconstructions = collected.of_both(model, CONVENTION_OF[metric])
    summary: dict[str, Any] = dict.fromkeys(("mean", "low", "high", "std", "median", "p5", "p95"))
    summary |= {"images": len(images), "infinite": 0}
    if len(images) < 2:
        return summary
    if metric.startswith("rfid"):
        return summary | {"mean": frechet_distance(images, reconstructions)}
    value, error = kernel_estimate(images, reconstructions)
    if len(images) < FEWEST:
        return summary | {"mean": value}
    return summary | {"mean": value, "low": value - QUANTILE * error, "high": value + QUANTILE * error}


def _about_images(collected: Collected, models: list[str]) -> dict[str, Any]:
    both = [(line["image"], model, line["models"][model]) for line in collected.lines for model in models]
    return {
        "images": len(collected.lines),
        "left_out": [
            {"image": line["image"], "reason": line["left_out"], "is_corrupt": line["is_corrupt"]}
            for line in collected.left_out
        ],
        "enlarged": [line["image"] for line in collected.lines if line["enlarged"]],
        "not_finite": [{"image": name, "model": model} for name, model, one in both if not one["is_finite"]],
        "identical": [{"image": name, "model": model} for name, model, one in both if one.get("is_identical")],
    }
