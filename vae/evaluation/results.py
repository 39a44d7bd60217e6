"""Results of an evaluation: rows of single images on disk, and the document and table that are made of them.

Each process appends a row as soon as an image is measured, so a rerun continues from there (`Rows`). `collect` reads
the rows of all processes and puts them into the order of the images. `of_dataset` and `as_csv` make the plain numbers
of `metrics.json` and `images.csv`.
"""

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

from vae.config.model import ARCHITECTURES
from vae.errors import InputError, printable
from vae.evaluation.compare import PIXELS, whole_models
from vae.evaluation.latents import combine
from vae.evaluation.statistics import FEWEST, QUANTILE, compare_pairs, summarise
from vae.metrics.registry import CONVENTION_OF, METRICS, OF_SETS, PAIRED
from vae.metrics.set_distances import frechet_distance, kernel_estimate

Line = dict[str, Any]  # a row about one image: dataset, index, image, and SKIPPED or what each model made of it
SKIPPED = "left_out"  # key of an image that could not be used, in rows and in metrics.json since the first version
Key = tuple[str, int]  # dataset, index


class Rows:
    """The rows in a folder: this process writes `rows_RANK.jsonl`, and reads the files of all processes."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Name the file of process `rank`; nothing is opened yet."""
        self.folder = folder
        self._path = folder / f"rows_{rank}.jsonl"

    def begin(self) -> None:
        """Open the file for appending. Raises InputError if the folder cannot be written.

        If a process was killed, the last row may be cut off, so the next one starts on a new line.
        """
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            shared = "output= must be one folder that all processes share"
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); {shared}") from error
        if self._file.tell():
            self._file.write(b"\n")

    def add(self, line: Line) -> None:
        """Write a row with its arrays to disk at once. Raises InputError if that fails, for instance on a full disk."""
        try:
            self._file.write(json.dumps(line, allow_nan=False, default=_packed).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); make room, then go on") from error

    def end(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self) -> Iterator[Line]:
        """Yield the complete rows of all processes, in no particular order."""
        for path in sorted(self.folder.glob("rows_*.jsonl")):
            with path.open("rb") as file:
                for text in file:
                    if (line := _parsed(text)) is not None:
                        yield line

    def are_there(self) -> bool:
        """Tell whether any process has left rows here."""
        return any(self.folder.glob("rows_*.jsonl"))

    def known(self) -> set[Key]:
        """Return the keys of the images that were measured.

        Images that could not be read are not among them: they may have been repaired.
        """
        return {key_of(line) for line in self.read() if SKIPPED not in line}

    def forget(self) -> None:
        """Delete the rows of all processes."""
        for path in self.folder.glob("rows_*.jsonl"):
            path.unlink()


def key_of(line: Line) -> Key:
    """Return (dataset, index), which identifies an image."""
    return line["dataset"], line["index"]


def _packed(array: np.ndarray) -> list[Any]:
    """Pack an array for JSON: dtype, shape, and its bytes in base64."""
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def _array(given: list[Any]) -> np.ndarray:
    """Restore an array from what `_packed` made of it."""
    dtype, shape, data = given
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape)


def _parsed(text: bytes) -> Line | None:
    """Parse a row; None if it was cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None  # cut off when the process was killed
    return line if isinstance(line, dict) else None


Vectors = dict[str, np.ndarray]
ORIGINAL = ""  # stands in for a model's name: the images themselves


@dataclass
class Collected:
    """The rows of one data set, ordered by index, and the arrays that were packed into them."""

    lines: list[Line] = field(default_factory=list)  # of images that were measured
    skipped: list[Line] = field(default_factory=list)
    features: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)  # model -> convention -> per image
    latents: dict[str, list[Vectors]] = field(default_factory=dict)  # model -> per image

    def column(self, model: str, metric: str) -> np.ndarray:
        """Return a value per image, (N,) float64.

        A value is NaN if the metric does not apply to the image, or if the reconstruction is not finite.
        """
        values = (line["models"][model].get("metrics", {}).get(metric) for line in self.lines)
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)

    def of_both(self, model: str, convention: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features (N, D) of the images whose reconstruction is finite, and of these reconstructions."""
        if not any(line["models"][model]["is_finite"] for line in self.lines):
            return np.zeros((0, 0)), np.zeros((0, 0))

        both = zip(self.features[ORIGINAL][convention], self.lines, strict=True)
        originals = [features for features, line in both if line["models"][model]["is_finite"]]
        return np.stack(originals), np.stack(self.features[model][convention])


def collect(lines: Iterable[Line], datasets: Sequence[str], models: Sequence[str]) -> dict[str, Collected]:
    """Choose one row per image, in the order of data sets and indices.

    If an image was skipped at first and measured later, the measured row counts.
    """
    order = {name: number for number, name in enumerate(datasets)}
    found: dict[tuple[int, int], Line] = {}
    for line in lines:
        key = order[line["dataset"]], line["index"]
        if key not in found or SKIPPED in found[key]:
            found[key] = _unpacked(line)

    collected = {name: Collected() for name in datasets}
    for key in sorted(found):
        line = found.pop(key)
        _take(collected[line["dataset"]], line, models)
    return collected


def _unpacked(line: Line) -> Line:
    """Unpack the arrays of a row in place.

    Their text is a third larger than the arrays, and would stay in memory beside them.
    """
    for packed in [line, *line.get("models", {}).values()]:
        for kind in ("features", "latents"):
            if kind in packed:
                packed[kind] = {name: _array(value) for name, value in packed[kind].items()}
    return line


def _take(into: Collected, line: Line, models: Sequence[str]) -> None:
    """Move one row, with its arrays, into the collection of its data set."""
    if SKIPPED in line:
        into.skipped.append(line)
        return
    _add(into.features.setdefault(ORIGINAL, {}), line.pop("features"))
    for name in models:
        result: dict[str, Any] = line["models"][name]
        _add(into.features.setdefault(name, {}), result.pop("features", {}))
        if "latents" in result:
            into.latents.setdefault(name, []).append(result.pop("latents"))
    into.lines.append(line)


def _add(into: dict[str, list[np.ndarray]], features: Vectors) -> None:
    """Append the features of one image to those of each convention."""
    for convention, values in features.items():
        into.setdefault(convention, []).append(values)


Document = dict[str, Any]
Row = dict[str, Any]  # dataset, index, image, pixels (their hash), model, metrics, flags


def of_dataset(collected: Collected, header: Document) -> Document:
    """Make the parts of the document about one data set: images, metrics, comparisons, latents."""
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
            model: combine(vectors, has_width=_has_width(header["models"][model]))
            for model, vectors in collected.latents.items()
        },
    }


def _has_width(model: Document) -> bool:
    """Say whether the posteriors of a model in the header have a width. Early documents do not name architectures."""
    return ARCHITECTURES[model.get("architecture", "kl")].is_variational


def rows_of(dataset: str, collected: Collected, models: list[str]) -> Iterator[Row]:
    """Yield a row of the table for each image and model."""
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
    """Write the table: a line for each image and model, with empty cells where there is no value.

    `pixels`, the hash of the image, tells it from another image of the same name.
    """
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


def as_markdown(document: Document) -> str:
    """Write the tables as Markdown, to paste into a README or a model card: metrics down, models across."""
    protocol = document["protocol"]
    parts = []
    for name, about in document["datasets"].items():
        heads = ["", *map(_escaped, whole_models(document))]
        rows = [heads, ["---"] * len(heads), *(map(_escaped, cells) for cells in cells_of(document, name))]
        images = f"{about['images']:,} images of {_escaped(name)} at {document['resolution']} px"
        parts.append("\n".join([f"{images}:", "", *(f"| {' | '.join(row)} |" for row in rows)]))

    has_intervals = any(about["images"] >= FEWEST for about in document["datasets"].values())
    mean = "Mean [95 % interval]" if has_intervals else "Mean"
    measured = f"{mean}, measured with vae {document['library']['vae']}, protocol {protocol['name']}"
    return "\n\n".join([*parts, f"{measured} ({protocol['sha256']})."]) + "\n"


def cells_of(document: Document, dataset: str) -> list[list[str]]:
    """Return the table of a data set: a row for each metric, with its title and the mean of each model."""
    rows = []
    for metric in document["measured"]:
        about = METRICS[metric]
        title = f"{about.title}{f' {about.unit}' if about.unit else ''} {about.arrow}"
        found = [document["metrics"][dataset][model][metric] for model in whole_models(document)]
        rows.append([title, *(cell(one, about.digits) for one in found)])
    return rows


def cell(summary: dict[str, Any] | None, digits: int) -> str:
    """Format a mean with its interval, or "-"."""
    if summary is None or summary["mean"] is None:
        return "-"
    mean = f"{summary['mean']:.{digits}f}"
    has_interval = summary["low"] is not None and summary["high"] is not None
    return f"{mean} [{summary['low']:.{digits}f}, {summary['high']:.{digits}f}]" if has_interval else mean


def _escaped(text: str) -> str:
    """Return text as a cell of a Markdown table shows it."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _asked(header: Document) -> list[list[tuple[str, str]]]:
    """Return the pairs of models to compare, as two families of comparisons that are corrected separately.

    The first compares whole models with each other, the second each crossed codec with the encoder's own model.
    """
    models = header["models"]
    whole = whole_models(header)
    own = {models[name]["encoder"]: name for name in whole}
    crossed = [(own[about["encoder"]], name) for name, about in models.items() if name not in whole]
    return [list(combinations(whole, 2)), crossed]


def _number(value: float | str | None) -> float | None:
    """Return the number; None if there is none or the metric does not apply."""
    return None if value is None or math.isnan(float(value)) else float(value)


def _of_set(collected: Collected, model: str, metric: str) -> Mapping[str, Any]:
    """Summarise a metric of a whole set, in the form of `summarise`.

    There is no value for fewer than 2 images. An rFID has no interval, and a KID has one from `FEWEST` images on.
    """
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
    """List the images that need a remark: skipped, enlarged, not finite, or reproduced exactly."""
    both = [(line["image"], model, line["models"][model]) for line in collected.lines for model in models]
    return {
        "images": len(collected.lines),
        SKIPPED: [
            {"image": line["image"], "reason": line[SKIPPED], "is_corrupt": line["is_corrupt"]}
            for line in collected.skipped
        ],
        "enlarged": [line["image"] for line in collected.lines if line["enlarged"]],
        "not_finite": [{"image": name, "model": model} for name, model, one in both if not one["is_finite"]],
        "identical": [{"image": name, "model": model} for name, model, one in both if one.get("is_identical")],
    }
