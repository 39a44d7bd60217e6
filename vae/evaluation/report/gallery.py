"""Choice of the images that a report shows, and the form in which the page writes names and numbers.

A report opens with typical images, followed by the worst and the best of each metric.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import product, zip_longest
from typing import Any

from vae.evaluation.compare import whole_models
from vae.evaluation.robustness import PROBES
from vae.metrics.registry import METRICS, PAIRED

NOTHING, MINUS = "\u2013", "\u2212"  # typographic
LONGEST = 90  # the most characters of a name that are shown
JOINERS = "\u200c\u200d"  # they join or part the letters of many scripts, and emoji


def harmless(text: str) -> str:
    """Turn any text into one visible line.

    Characters that are invisible, are half of a pair, or change the direction of writing become escapes.
    """
    return text if text.isprintable() else "".join(_visible(character) for character in text)


def short(name: str) -> str:
    """Shorten a name in the middle; the end is kept because it tells files apart."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]} … {name[-LONGEST // 2 :]}"


def figure(value: float | None, digits: int = 4) -> str:
    """Format with `digits` decimals and thousands separators; a dash if there is no finite value."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 4) -> str:
    """Format a number of any size with `digits` significant digits; a dash if there is no finite value."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}g}".replace("-", MINUS)


def measured(metric: str, value: float | None) -> str:
    """Format the value of a metric with its unit, as "31.245 dB"."""
    about = METRICS[metric]
    return f"{figure(value, about.digits)} {about.unit}".rstrip()


def listed(words: Sequence[str]) -> str:
    """Join words, as "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: int, what: str) -> str:
    """Say how many there are of something, as "1 image" or "2 images"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _visible(character: str) -> str:
    """Return the character, or its escape if it is not printable."""
    return character if character.isprintable() or character in JOINERS else repr(character)[1:-1]


Row = dict[str, Any]  # dataset, index, image, model, metrics {name: number or None}, flags
Case = tuple[str, int]  # data set and index of an image
Rankings = dict[tuple[str, str, str], list[Row]]

MAIN = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg")
TYPICAL = (0.5, 0.25, 0.75)  # quantiles of the first metric; a report opens with the median image


def choose(document: dict[str, Any], rows: Sequence[Row], most: int = 24) -> list[Case]:
    """Choose at most `most` images, the most telling first; data sets take turns."""
    document = of_whole_models(document)
    return telling(document, rows, rankings(document, rows))[:most]


def of_whole_models(document: dict[str, Any]) -> dict[str, Any]:
    """Drop crossed encoders and decoders from a document: these have a table of their own."""
    models = {name: document["models"][name] for name in whole_models(document)}
    comparisons = {
        dataset: [one for one in compared if one["first"] in models and one["second"] in models]
        for dataset, compared in document["comparisons"].items()
    }
    return document | {"models": models, "comparisons": comparisons}


def telling(document: dict[str, Any], rows: Sequence[Row], ranks: Rankings) -> list[Case]:
    """Order the images by how much they tell.

    Typical images by the first model and metric come first, then both ends of every ranking. If no value is finite, the
    images come in the order of the rows.
    """
    wanted = []
    for dataset in document["datasets"]:
        orders = [order for (of, _, _), order in ranks.items() if of == dataset and order]
        typical = [orders[0][int(quantile * (len(orders[0]) - 1))] for quantile in TYPICAL if orders]
        ends = [order[end] for end in (-1, 0) for order in orders]
        any_of_them = [] if orders else [row for row in rows if row["dataset"] == dataset]
        wanted.append(dict.fromkeys((dataset, row["index"]) for row in typical + ends + any_of_them))

    return [case for turn in zip_longest(*wanted) for case in turn if case is not None]


def rankings(document: dict[str, Any], rows: Sequence[Row]) -> Rankings:
    """Rank the rows with a finite value by data set, main metric and model.

    The best comes first, and ties are ordered by index.
    """
    keys = product(document["datasets"], main_metrics(document), document["models"])
    ranks: Rankings = {key: [] for key in keys}
    for (dataset, metric, model), order in ranks.items():
        order += [
            row
            for row in rows
            if row["model"] == model and row["dataset"] == dataset and is_finite(row["metrics"].get(metric))
        ]
        order.sort(key=partial(_place, metric))
    return ranks


def main_metrics(document: dict[str, Any]) -> list[str]:
    """Return the metrics of `MAIN` for which some model has a mean.

    If there are none, all other metrics of single images that have a mean are returned.
    """
    found = {
        name
        for by_model in document["metrics"].values()
        for by_metric in by_model.values()
        for name, summary in by_metric.items()
        if summary is not None and name in PAIRED
    }
    return [name for name in MAIN if name in found] or [name for name in PAIRED if name in found]


def is_finite(value: float | None) -> bool:
    """Tell whether there is a value and it is finite."""
    return value is not None and math.isfinite(value)


def _place(metric: str, row: Row) -> tuple[float, int]:
    """Return the key by which rows are ranked."""
    return PAIRED[metric].badness(row["metrics"][metric]), row["index"]


def not_finite(one: dict[str, Any]) -> dict[str, int]:
    """Count the images that come out not finite, as {probe in words: the most in any trial of it}."""
    trials = {"plain": [{"psnr": one["plain"]}]} | {name: one.get(name) or [] for name in PROBES}
    found: dict[str, int] = {}
    for name, done in trials.items():
        counts = [value["not_finite"] for trial in done for value in trial.values() if isinstance(value, dict)]
        if any(counts):
            found["coding alone" if name == "plain" else name.replace("_", " ")] = max(counts)
    return found
