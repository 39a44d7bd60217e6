"""The sections of the report: tables of means, compatibility of encoders and decoders, latents, and robustness.

Each section turns a part of the document into a dataclass of formatted text and charts, which the template lays out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from vae.evaluation.compare import whole_models
from vae.evaluation.report.charts import Point, bars, histograms, intervals, lines, logarithms
from vae.evaluation.report.findings import best
from vae.evaluation.report.gallery import (
    MINUS,
    NOTHING,
    Row,
    counted,
    figure,
    is_finite,
    not_finite,
    short,
    significant,
)
from vae.evaluation.report.images import as_data, coloured, tiled
from vae.metrics.registry import METRICS, PAIRED, Metric

CROSSED = ("psnr", "lpips_vgg", "lpips_alex", "rfid")  # metrics that have a compatibility matrix, if measured
SHADES = 6  # classes s0 (best) to s5


@dataclass(frozen=True)
class Cell:
    """The mean of one metric of one model; `spread` is the rest of the summary, shown on request."""

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
    """The distribution of one metric over the images."""

    metric: Metric
    chart: Markup


@dataclass(frozen=True)
class Matrix:
    """A compatibility matrix: encoders down, decoders across.

    A cell is (mean, shade, difference from the encoder's own decoder).
    """

    metric: Metric
    decoders: list[str]
    lines: list[tuple[str, list[tuple[str, int | None, str]]]]


def summary(document: dict[str, Any], dataset: str) -> list[Line]:
    """Return the table of means of a data set, a line for each metric."""
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
    """Draw how every metric of single images is distributed over the images."""
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
    """Return the compatibility matrices; empty if no encoder is paired with another model's decoder."""
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
    """Format the summary of one metric."""
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
    """Return a cell of a matrix: mean, shade, and difference from the encoder's own decoder."""
    value, own = means.get((encoder, decoder)), means.get((encoder, encoder))
    if value is None:
        return NOTHING, None, ""

    # The shade runs from the best mean of the matrix to the worst.
    badness = [metric.badness(mean) for mean in means.values() if mean is not None]
    share = (metric.badness(value) - min(badness)) / ((max(badness) - min(badness)) or 1.0)
    beside = f"{value - own:+.{metric.digits}f}".replace("-", MINUS) if own is not None and encoder != decoder else ""
    return figure(value, metric.digits), round(share * (SHADES - 1)), beside


def _name(path: str, own: dict[str, str]) -> str:
    """Return the name of the model at `path`, or of the file if there is no such model."""
    return own.get(path, PurePath(path).name)


MATRIX_BYTES = 20_000

FACTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {  # title, what it means, from the statistics
    "scaling_factor": ("for the configuration of a diffusion model", lambda one: significant(one["scaling_factor"], 5)),
    "shift_factor": ("likewise", lambda one: significant(one["shift_factor"], 4)),
    "standard deviation": ("over all channels, noise of the posterior included", lambda one: significant(one["std"])),
    "KL": ("nats per latent element, mean over channels", lambda one: figure(one["kl"], 3)),
    "active channels": (
        "whose mean varies over the images by more than 0.01",
        lambda one: f"{one['active_channels']} of {len(one['kl_per_channel'])}",
    ),
    "effective rank": ("how many directions the channels really use", lambda one: figure(one["effective_rank"], 1)),
    "channel correlation": ("mean absolute", lambda one: figure(one["mean_absolute_correlation"], 3)),
    "autocorrelation": ("of neighbours 1, 2 and 4 cells apart", lambda one: _along(one["autocorrelation"])),
    "high to low frequencies": (
        "power per coefficient, upper over lower half",
        lambda one: significant(one["spectrum"]["high_to_low"], 3),
    ),
}


@dataclass(frozen=True)
class Channels:
    """Charts of one model's channels; `deviations` has their standard deviations."""

    model: str
    kl: Markup
    deviations: Markup
    correlation: str
    count: int


@dataclass(frozen=True)
class Latents:
    """The section about latents; `facts` are (title, meaning, a value for each of `models`)."""

    models: list[str]
    facts: list[tuple[str, str, list[str]]]
    spectrum: Markup
    channels: list[Channels]


def latent_section(document: dict[str, Any], dataset: str) -> Latents | None:
    """Make the section about latents: values to copy, channels and layout. None if nothing was measured."""
    every = list(document["models"])
    of_models = (document.get("latents") or {}).get(dataset) or {}
    known = {model: of_models[model] for model in every if of_models.get(model)}
    if not known:
        return None

    facts = [(title, meaning, [value(one) for one in known.values()]) for title, (meaning, value) in FACTS.items()]

    # A model without latents keeps its place, so that colours stay those of the key.
    series = [_spectrum(known[model]["spectrum"]) if model in known else [] for model in every]
    words = "Radial power spectrum of the latents, one line for each model"
    chart = lines(series, "cycles per latent cell", "log10 power", words) if any(series) else Markup()
    return Latents(
        list(known), facts, chart, [_channels(model, every.index(model), one) for model, one in known.items()]
    )


def _channels(model: str, number: int, one: dict[str, Any]) -> Channels:
    """Draw KL, standard deviation and correlation of the channels of one model."""
    kl, deviations = one["kl_per_channel"], one["latents_std"]
    correlation = np.array([[value or 0.0 for value in row] for row in one["correlation"]])
    return Channels(
        model,
        bars(kl, number, "KL of each channel in nats per element"),
        bars(deviations, number, "Standard deviation of each channel"),
        as_data(tiled(coloured(correlation)[None]), MATRIX_BYTES),
        len(kl),
    )


def _spectrum(one: dict[str, Any]) -> list[tuple[float, float]]:
    """Return the power spectrum as points, with log10 of the power."""
    return logarithms((x, y) for x, y in zip(one["frequencies"], one["power"], strict=True) if y is not None)


def _along(lags: dict[str, float | None]) -> str:
    """Format the autocorrelation at all lags."""
    return ", ".join(figure(value, 2) for value in lags.values())


NOT_FINITE = "not finite"
Trial = dict[str, Any]  # what was done, and {name: decibels over the images}

TRANSFORMS = {
    "shift": "shifted by one cell",
    "flip": "mirrored",
    "rotation": "turned by 90°",
    "scale": "halved",
}


@dataclass(frozen=True)
class Group:
    """Trials of one kind; `lines` are (what was done, decibels for each of the models)."""

    title: str
    meaning: str
    lines: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Curve:
    """One chart of the section about robustness."""

    title: str
    meaning: str
    chart: Markup


@dataclass(frozen=True)
class Robustness:
    """The section about robustness.

    It says what is left of an image when its latents, its pixels or the way it is coded are disturbed.
    """

    models: list[str]
    images: int
    curves: list[Curve]
    groups: list[Group]
    missing: list[str]


def robustness_section(document: dict[str, Any]) -> Robustness | None:
    """Make the section about robustness; None if nothing was measured."""
    every = list(document["models"])
    of_models = document.get("robustness") or {}
    known = {model: of_models[model] for model in every if of_models.get(model)}
    if not known:
        return None
    curves = [
        Curve(title, meaning, lines(series, across, "PSNR in dB", title))
        for title, meaning, across, points in CURVES
        if any(series := [points(known[model]) if model in known else [] for model in every])
    ]

    missing = dict.fromkeys(
        f"{probe.replace('_', ' ')}: not measured, {reason}"
        for one in known.values()
        for probe, reason in (one.get("missing") or {}).items()
    )

    broken = [
        f"{short(model)}: {count} of {counted(one['images'], 'image')} not finite by {probe}, and not in its means"
        for model, one in known.items()
        for probe, count in not_finite(one).items()
    ]

    precision = document.get("precision") or {}

    groups = [*_groups(list(known.values())), *_formats([precision.get(model) or {} for model in known])]
    return Robustness(list(known), max(one["images"] for one in known.values()), curves, groups, [*broken, *missing])


def _noisy(one: dict[str, Any]) -> list[Point]:
    """Return PSNR over noise on the latents, the undisturbed reconstruction included."""
    return _points([{"noise": 0.0, "psnr": one["plain"]}, *(one.get("latent_noise") or [])], "noise")


def _drifted(one: dict[str, Any]) -> list[Point]:
    """Return PSNR over the number of round trips."""
    return _points(one.get("drift") or [], "round")


CURVES: list[tuple[str, str, str, Callable[[dict[str, Any]], list[Point]]]] = [
    (
        "Noise on the latents",
        "As a diffusion model's errors would be: the flatter, the more of them the decoder forgives.",
        "noise in standard deviations of the latents",
        _noisy,
    ),
    (
        "Again and again",
        "Coded once, twice, to ten times, as when somebody edits, saves and edits.",
        "round trips",
        _drifted,
    ),
]


def _groups(models: list[dict[str, Any]]) -> Iterator[Group]:
    """Yield the tables of noise, missing pixels, transformed latents and tiles."""
    kinds = [
        (
            "input_noise",
            "Noise on the pixels",
            "the noisy image → what coding makes of it",
            _noise_words,
            ("input", "psnr"),
        ),
        (
            "masked",
            "Missing pixels",
            "set to grey; those pixels alone, before → after coding",
            _mask_words,
            ("input_masked", "psnr_masked"),
        ),
        (
            "equivariance",
            "Transformed latents",
            "decoded, against the reconstruction transformed likewise",
            lambda trial: TRANSFORMS.get(trial["transform"], trial["transform"]),
            ("psnr",),
        ),
    ]

    for key, title, meaning, words, names in kinds:
        if found := _table([one.get(key) or [] for one in models], words, names):
            yield Group(title, meaning, found)

    tiled = [one.get("tiled") or [] for one in models]
    rows = [
        *_table(tiled, lambda trial: f"decoded in tiles of {trial['tile']} pixels", ("decoded",)),
        *_table(
            tiled, lambda trial: f"encoded and decoded in tiles of {trial['tile']} pixels", ("encoded_and_decoded",)
        ),
    ]
    if rows:
        yield Group("Tiles", "against the whole image at once", rows)


def _formats(models: list[dict[str, Any]]) -> Iterator[Group]:
    """Yield the table of half precision formats."""
    formats = dict.fromkeys(name for one in models for name in one.get("psnr") or {})
    if formats:
        rows = [(name, [_in_format(one.get("psnr") or {}, name) for one in models]) for name in formats]
        yield Group("Half precision", "against float32", rows)


def _table(
    models: list[list[Trial]], words: Callable[[Trial], str], names: tuple[str, ...]
) -> list[tuple[str, list[str]]]:
    """Return a line for each thing that was done to any of the models."""
    done = dict.fromkeys(words(trial) for trials in models for trial in trials)
    cells = [
        {words(trial): " → ".join(_decibels(trial.get(name)) for name in names) for trial in trials}
        for trials in models
    ]
    return [(what, [cell.get(what, NOTHING) for cell in cells]) for what in done]


def _noise_words(trial: Trial) -> str:
    """Say how strong the noise on the pixels was."""
    return f"{trial['levels']} grey levels"


def _mask_words(trial: Trial) -> str:
    """Say which pixels were missing."""
    where = "at random" if trial["mask"] == "random" else f"in a {trial['mask']}"
    return f"{trial['share']:.0%} {where}"


def _points(trials: list[Trial], across: str) -> list[Point]:
    """Return (`across`, mean PSNR) for each trial that has a mean."""
    values = [(float(trial[across]), trial["psnr"]["mean"]) for trial in trials]
    return [(x, y) for x, y in values if y is not None]


def _in_format(psnr: dict[str, float | None], name: str) -> str:
    """Format the PSNR in a half precision format.

    It is absent if the format was not tried, and None if an image came out not finite.
    """
    if name not in psnr:
        return NOTHING
    value = psnr[name]
    return NOT_FINITE if value is None else figure(value, 1)


def _decibels(over_images: dict[str, Any] | None) -> str:
    """Format the mean over the images of a trial, with the number of those that are not finite beside it."""
    if over_images is None:
        return NOTHING
    mean = over_images["mean"]
    broken = over_images.get("not_finite", 0)
    if mean is None and over_images.get("identical"):
        known = "identical"
    elif mean is None and broken:
        return NOT_FINITE
    else:
        known = figure(mean, 1)
    return f"{known} ({broken} {NOT_FINITE})" if broken else known
