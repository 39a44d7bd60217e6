"""`metrics.json` and `images.csv`: all that an evaluation found, in plain numbers."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vae.evaluation.collected import Collected
from vae.evaluation.comparing import compare_pairs
from vae.evaluation.latents import combine
from vae.evaluation.statistics import summarise
from vae.metrics.frechet import frechet_distance
from vae.metrics.kernel import kernel_estimate
from vae.metrics.registry import OF_SETS, PAIRED

NORMAL_95 = 1.96  # standard errors
Document = dict[str, Any]
CONVENTION_OF = {"rfid": "legacy", "kid": "legacy", "rfid_clean": "clean", "kid_clean": "clean"}
Row = dict[str, Any]  # dataset, index, image, model, metrics, flags


def of_dataset(collected: Collected, measured: list[str], models: list[str]) -> Document:
    """The parts of the document about one data set: images, metrics, comparisons, latents."""
    pairs = [name for name in measured if name in PAIRED]
    columns = {model: {name: collected.column(model, name) for name in pairs} for model in models}
    metrics: dict[str, dict[str, Any]] = {
        model: {name: summarise(values) for name, values in columns[model].items()} for model in models
    }
    for model in models:
        metrics[model] |= {name: _of_set(collected, model, name) for name in measured if name in OF_SETS}
    return {
        "images": _about_images(collected, columns, models),
        "metrics": metrics,
        "comparisons": compare_pairs(columns),
        "latents": {model: combine(vectors) for model, vectors in collected.latents.items()},
    }


def rows_of(dataset: str, collected: Collected, models: list[str]) -> Iterator[Row]:
    """One for each image and model."""
    for line in collected.lines:
        for model in models:
            result = line["models"][model]
            flags = ["enlarged"] if line["enlarged"] else []
            flags += [] if result["is_finite"] else ["not finite"]
            numbers = {name: None if v is None else float(v) for name, v in result.get("metrics", {}).items()}
            flags += ["identical"] if numbers.get("psnr") == np.inf else []
            about = {"dataset": dataset, "index": line["index"], "image": line["image"], "model": model}
            yield about | {"metrics": numbers, "flags": flags}


def as_csv(rows: list[Row], measured: list[str]) -> str:
    """A line for each image and model; empty where there is no value."""
    pairs = [name for name in measured if name in PAIRED]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["dataset", "image", "model", *pairs, "flags"])
    for row in rows:
        values = (row["metrics"].get(name) for name in pairs)
        cells = ["" if value is None else repr(value) for value in values]
        writer.writerow([row["dataset"], row["image"], row["model"], *cells, " ".join(row["flags"])])
    return text.getvalue()


def _of_set(collected: Collected, model: str, metric: str) -> Mapping[str, Any]:
    images, reconstructions = collected.of_both(model, CONVENTION_OF[metric])
    summary: dict[str, Any] = dict.fromkeys(("mean", "low", "high", "std", "median", "p5", "p95"))
    summary |= {"images": len(images), "infinite": 0}
    if len(images) < 2:
        return summary
    if metric.startswith("rfid"):
        return summary | {"mean": frechet_distance(images, reconstructions)}
    value, error = kernel_estimate(images, reconstructions)
    return summary | {"mean": value, "low": value - NORMAL_95 * error, "high": value + NORMAL_95 * error}


def _about_images(collected: Collected, columns: dict[str, dict[str, np.ndarray]], models: list[str]) -> dict[str, Any]:
    names = [line["image"] for line in collected.lines]
    identical, broken = [], []
    for model in models:
        values = columns[model].get("psnr", np.zeros(0))
        identical += [{"image": names[i], "model": model} for i in np.flatnonzero(np.isposinf(values))]
        without = [line["image"] for line in collected.lines if not line["models"][model]["is_finite"]]
        broken += [{"image": name, "model": model} for name in without]
    return {
        "images": len(names),
        "left_out": [{"image": line["image"], "reason": line["left_out"]} for line in collected.left_out],
        "enlarged": [line["image"] for line in collected.lines if line["enlarged"]],
        "not_finite": broken,
        "identical": identical,
    }
