"""The tables of the page: means with intervals, and what crossed encoders and decoders make of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from vae.evaluation.recorded import whole_models
from vae.evaluation.report.charts import histograms, intervals
from vae.evaluation.report.findings import best
from vae.evaluation.report.gallery import Row, is_finite
from vae.evaluation.report.wording import MINUS, NOTHING, figure
from vae.metrics.registry import METRICS, PAIRED, Metric

CROSSED = ("psnr", "lpips_vgg", "lpips_alex", "rfid")  # metrics of a compatibility matrix, where measured
SHADES = 6  # classes s0 (best) to s5


@dataclass(frozen=True)
class Cell:
    """`spread` is the rest of the summary, for those who ask."""

    mean: str
    interval: str
    spread: str
    is_best: bool


@dataclass(frozen=True)
class Line:
    """One metric of all models; `missing` says why there is none."""

    metric: Metric
    arrow: str
    cells: list[Cell]
    chart: Markup
    missing: str = ""


@dataclass(frozen=True)
class Panel:
    metric: Metric
    chart: Markup


@dataclass(frozen=True)
class Matrix:
    """Encoders down, decoders across; a cell is (mean, its shade, what it is against the encoder's own decoder)."""

    metric: Metric
    decoders: list[str]
    lines: list[tuple[str, list[tuple[str, int | None, str]]]]


def summary(document: dict[str, Any], dataset: str) -> list[Line]:
    by_model = document["metrics"].get(dataset, {})
    models = list(document["models"])
    lines: list[Line] = []
    explained: dict[str, str] = {}  # reason -> the first metric that is not measured for it
    for name, metric in METRICS.items():
        found = [by_model.get(model, {}).get(name) for model in models]
        if name in document["missing"]:
            reason = document["missing"][name]
            first = explained.setdefault(reason, metric.title)
            lines.append(Line(metric, metric.arrow, [], Markup(), reason if first == metric.title else f"see {first}"))
        elif any(found):
            first = best(document, dataset, name)
            cells = [_cell(metric, one, model == first) for model, one in zip(models, found, strict=True)]
            chart = intervals(found, metric.ideal, f"{metric.title}: means and intervals of all models")
            lines.append(Line(metric, metric.arrow, cells, chart))
    return lines


def distributions(document: dict[str, Any], rows: Sequence[Row], dataset: str) -> list[Panel]:
    """Of every metric of one image, over the images."""
    panels = []
    for name, metric in PAIRED.items():
        columns: dict[str, list[float]] = {model: [] for model in document["models"]}
        for row in rows:
            if row["dataset"] == dataset and is_finite(row["metrics"].get(name)):
                columns[row["model"]].append(row["metrics"][name])
        if any(columns.values()):
            means = [float(np.mean(column)) if column else None for column in columns.values()]
            words = f"How {metric.title} is distributed over the images of each model"
            panels.append(Panel(metric, histograms(list(columns.values()), means, words)))
    return panels


def matrices(document: dict[str, Any], dataset: str) -> list[Matrix]:
    """None unless some model is the encoder of one and the decoder of another."""
    models = document["models"]
    own = {models[name]["encoder"]: name for name in whole_models(document)}
    if len(own) == len(models):
        return []
    pairs = {(about["encoder"], about["decoder"]): name for name, about in models.items()}
    encoders, decoders = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
    found = []
    for metric in CROSSED:
        of_models = document["metrics"].get(dataset, {})
        means = {pair: (of_models.get(name, {}).get(metric) or {}).get("mean") for pair, name in pairs.items()}
        if any(is_finite(mean) for mean in means.values()):
            lines = [
                (_name(encoder, own), [_crossed(METRICS[metric], means, encoder, decoder) for decoder in decoders])
                for encoder in encoders
            ]
            found.append(Matrix(METRICS[metric], [_name(decoder, own) for decoder in decoders], lines))
    return found


def _cell(metric: Metric, one: dict[str, Any] | None, is_best: bool) -> Cell:
    if one is None or one["mean"] is None:
        return Cell(NOTHING, "", "", False)
    low, high, std, median, p5, p95 = (
        figure(one.get(key), metric.digits) for key in ("low", "high", "std", "median", "p5", "p95")
    )
    interval = f"{low} to {high}" if one.get("low") is not None else ""
    spread = f"deviation {std}, median {median}, 5 % below {p5}, 5 % above {p95}, {one['images']:,} images"
    spread += f", {one['infinite']} infinite ones left out" if one.get("infinite") else ""
    return Cell(figure(one["mean"], metric.digits), interval, spread if interval else "", is_best)


def _crossed(
    metric: Metric, means: dict[tuple[str, str], float | None], encoder: str, decoder: str
) -> tuple[str, int | None, str]:
    value, own = means.get((encoder, decoder)), means.get((encoder, encoder))
    if value is None:
        return NOTHING, None, ""
    badness = [metric.badness(mean) for mean in means.values() if mean is not None]
    share = (metric.badness(value) - min(badness)) / ((max(badness) - min(badness)) or 1.0)
    beside = f"{value - own:+.{metric.digits}f}".replace("-", MINUS) if own is not None and encoder != decoder else ""
    return figure(value, metric.digits), round(share * (SHADES - 1)), beside


def _name(path: str, own: dict[str, str]) -> str:
    return own.get(path, PurePath(path).name)
