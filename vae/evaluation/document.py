"""`metrics.json` and `images.csv`: all that an evaluation found, in plain numbers."""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from vae.evaluation.collected import Collected
from vae.evaluation.comparing import compare_pairs
from vae.evaluation.latents import combine
from vae.evaluation.recorded import PIXELS, whole_models
from vae.evaluation.statistics import FEWEST, QUANTILE, summarise
from vae.metrics.frechet import frechet_distance
from vae.metrics.kernel import kernel_estimate
from vae.metrics.registry import CONVENTION_OF, OF_SETS, PAIRED

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
