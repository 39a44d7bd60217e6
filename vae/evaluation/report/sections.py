"""The tables of the page: means with intervals, and what crossed encoders and decoders make of each other.

The section about latents: numbers to copy, what each channel carries, how they are laid out.

The section about robustness: what is left of an image when latents, pixels or the coding are disturbed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from vae.evaluation.compare import whole_models
from vae.evaluation.report.charts import Point, bars, histograms, intervals, lines, logarithms
from vae.evaluation.report.findings import best
from vae.evaluation.report.gallery import MINUS, NOTHING, Row, counted, figure, is_finite, short, significant
from vae.evaluation.report.images import as_data, coloured, tiled
from vae.evaluation.robustness import PROBES
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
    """Charts of one model; `deviations` has the mean of each channel beside its standard deviation."""

    model: str
    kl: Markup
    deviations: Markup
    correlation: str
    count: int


@dataclass(frozen=True)
class Latents:
    """`facts`: (title, meaning, a value for each of `models`)."""

    models: list[str]
    facts: list[tuple[str, str, list[str]]]
    spectrum: Markup
    channels: list[Channels]


def latent_section(document: dict[str, Any], dataset: str) -> Latents | None:
    every = list(document["models"])
    of_models = (document.get("latents") or {}).get(dataset) or {}
    known = {model: of_models[model] for model in every if of_models.get(model)}
    if not known:
        return None
    facts = [(title, meaning, [value(one) for one in known.values()]) for title, (meaning, value) in FACTS.items()]
    series = [_spectrum(known[model]["spectrum"]) if model in known else [] for model in every]
    words = "Radial power spectrum of the latents, one line for each model"
    chart = lines(series, "cycles per latent cell", "log10 power", words) if any(series) else Markup()
    return Latents(
        list(known), facts, chart, [_channels(model, every.index(model), one) for model, one in known.items()]
    )


def _channels(model: str, number: int, one: dict[str, Any]) -> Channels:
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
    return logarithms((x, y) for x, y in zip(one["frequencies"], one["power"], strict=True) if y is not None)


def _along(lags: dict[str, float | None]) -> str:
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
    """Trials of one kind: (what was done, decibels of each of the models)."""

    title: str
    meaning: str
    lines: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Curve:
    title: str
    meaning: str
    chart: Markup


@dataclass(frozen=True)
class Robustness:
    models: list[str]
    images: int
    curves: list[Curve]
    groups: list[Group]
    missing: list[str]


def robustness_section(document: dict[str, Any]) -> Robustness | None:
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


def not_finite(one: dict[str, Any]) -> dict[str, int]:
    """{probe in words: how many images it makes come out as what is not a number}, at most by any trial of it."""
    trials = {"plain": [{"psnr": one["plain"]}]} | {name: one.get(name) or [] for name in PROBES}
    found: dict[str, int] = {}
    for name, done in trials.items():
        counts = [value["not_finite"] for trial in done for value in trial.values() if isinstance(value, dict)]
        if any(counts):
            found["coding alone" if name == "plain" else name.replace("_", " ")] = max(counts)
    return found


def _noisy(one: dict[str, Any]) -> list[Point]:
    return _points([{"noise": 0.0, "psnr": one["plain"]}, *(one.get("latent_noise") or [])], "noise")


def _drifted(one: dict[str, Any]) -> list[Point]:
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
    formats = dict.fromkeys(name for one in models for name in one.get("psnr") or {})
    if formats:
        rows = [(name, [_in_format(one.get("psnr") or {}, name) for one in models]) for name in formats]
        yield Group("Half precision", "against float32", rows)


def _table(
    models: list[list[Trial]], words: Callable[[Trial], str], names: tuple[str, ...]
) -> list[tuple[str, list[str]]]:
    """A line for each thing that was done to any of the models."""
    done = dict.fromkeys(words(trial) for trials in models for trial in trials)
    cells = [
        {words(trial): " → ".join(_decibels(trial.get(name)) for name in names) for trial in trials}
        for trials in models
    ]
    return [(what, [cell.get(what, NOTHING) for cell in cells]) for what in done]


def _noise_words(trial: Trial) -> str:
    return f"{trial['levels']} grey levels"


def _mask_words(trial: Trial) -> str:
    where = "at random" if trial["mask"] == "random" else f"in a {trial['mask']}"
    return f"{trial['share']:.0%} {where}"


def _points(trials: list[Trial], across: str) -> list[Point]:
    values = [(float(trial[across]), trial["psnr"]["mean"]) for trial in trials]
    return [(x, y) for x, y in values if y is not None]


def _in_format(psnr: dict[str, float | None], name: str) -> str:
    """A number is absent where the format was not tried, and null where an image came out as what is not one."""
    if name not in psnr:
        return NOTHING
    value = psnr[name]
    return NOT_FINITE if value is None else figure(value, 1)


def _decibels(over_images: dict[str, Any] | None) -> str:
    """Over the images of a trial, those that are not finite counted beside it."""
    if over_images is None:
        return NOTHING
    mean, broken = over_images["mean"], over_images.get("not_finite", 0)
    if mean is None and over_images.get("identical"):
        known = "identical"
    elif mean is None and broken:
        return NOT_FINITE
    else:
        known = figure(mean, 1)
    return f"{known} ({broken} {NOT_FINITE})" if broken else known
