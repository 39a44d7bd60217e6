"""Numbers and names as the page writes them.

Which images a report shows: typical ones, and the worst and best of each metric."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import product, zip_longest
from typing import Any

from vae.evaluation.compare import whole_models
from vae.metrics.registry import METRICS, PAIRED

NOTHING, MINUS = "\u2013", "\u2212"  # typographic
LONGEST = 90  # characters of a name that are shown
JOINERS = "\u200c\u200d"  # letters of many scripts, and emoji, are joined or parted by these


def harmless(text: str) -> str:
    """Any text as one line: what is invisible, half a character, or turns the direction of writing, as its escape."""
    return text if text.isprintable() else "".join(_visible(character) for character in text)


def short(name: str) -> str:
    """Names of any length; the end tells files apart."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]} … {name[-LONGEST // 2 :]}"


def figure(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 4) -> str:
    """For numbers of any size."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}g}".replace("-", MINUS)


def measured(metric: str, value: float | None) -> str:
    """ "PSNR 31.245 dB" """
    about = METRICS[metric]
    return f"{figure(value, about.digits)} {about.unit}".rstrip()


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _visible(character: str) -> str:
    return character if character.isprintable() or character in JOINERS else repr(character)[1:-1]


Row = dict[str, Any]  # dataset, index, image, model, metrics {name: number or None}, flags
Case = tuple[str, int]  # data set and index of an image
Rankings = dict[tuple[str, str, str], list[Row]]

MAIN = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg")
TYPICAL = (0.5, 0.25, 0.75)  # quantiles of the first metric; the median image is what a report opens with


def choose(document: dict[str, Any], rows: Sequence[Row], most: int = 24) -> list[Case]:
    """At most `most` images, the most telling first; data sets take turns."""
    document = of_whole_models(document)
    return telling(document, rows, rankings(document, rows))[:most]


def of_whole_models(document: dict[str, Any]) -> dict[str, Any]:
    """The same without encoders that meet decoders of others: those have a table of their own."""
    models = {name: document["models"][name] for name in whole_models(document)}
    comparisons = {
        dataset: [one for one in compared if one["first"] in models and one["second"] in models]
        for dataset, compared in document["comparisons"].items()
    }
    return document | {"models": models, "comparisons": comparisons}


def telling(document: dict[str, Any], rows: Sequence[Row], ranks: Rankings) -> list[Case]:
    """Typical images by the first model and metric, then both ends of each; any images where no value is finite."""
    wanted = []
    for dataset in document["datasets"]:
        orders = [order for (of, _, _), order in ranks.items() if of == dataset and order]
        typical = [orders[0][int(quantile * (len(orders[0]) - 1))] for quantile in TYPICAL if orders]
        ends = [order[end] for end in (-1, 0) for order in orders]
        any_of_them = [] if orders else [row for row in rows if row["dataset"] == dataset]
        wanted.append(dict.fromkeys((dataset, row["index"]) for row in typical + ends + any_of_them))
    return [case for turn in zip_longest(*wanted) for case in turn if case is not None]


def rankings(document: dict[str, Any], rows: Sequence[Row]) -> Rankings:
    """By data set, main metric and model: rows with a finite value, the best first, ties by index."""
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
    """Those of MAIN that some model has a mean of; if it has none of them, all others of one image that do."""
    found = {
        name
        for by_model in document["metrics"].values()
        for by_metric in by_model.values()
        for name, summary in by_metric.items()
        if summary is not None and name in PAIRED
    }
    return [name for name in MAIN if name in found] or [name for name in PAIRED if name in found]


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _place(metric: str, row: Row) -> tuple[float, int]:
    return PAIRED[metric].badness(row["metrics"][metric]), row["index"]
