"""Which of two models is better, image by image, in figures and in honest words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from vae.evaluation.statistics import FEWEST, chance, holm, interval
from vae.metrics.registry import PAIRED, Metric

NO_DIFFERENCE = "no difference"  # what every verdict begins with that shows none
SHOWN = 0.05  # a difference is shown where the corrected p is below this and the interval leaves out 0

Columns = dict[str, dict[str, np.ndarray]]  # {model: {metric: (N,) float64}}, all of the same images in the same order


@dataclass(frozen=True)
class Comparison:
    """How much better `second` is than `first` on the images that both have a number of.

    `difference` is the mean gain in quality (Metric.badness of `first` less that of `second`) in the metric's unit,
    positive where `second` is better, over the `images` where both are finite; `low` to `high` is its 95 % interval.
    `wins` is the share of images on which `second` is better, ties halved; infinite quality wins over finite.
    `p` is two-sided, and corrected where the comparison is one of several.
    """

    metric: str
    first: str
    second: str
    images: int
    difference: float | None
    low: float | None
    high: float | None
    wins: float
    p: float

    @property
    def is_shown(self) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.p < SHOWN and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        metric, both = PAIRED[self.metric], f"between {self.first} and {self.second} in {PAIRED[self.metric].title}"
        if self.difference is not None and self.is_shown:
            is_gain = self.difference > 0
            better, other = (self.second, self.first) if is_gain else (self.first, self.second)
            by = f"{metric.title} {metric.direction} by {self.gain(1 if is_gain else -1)}"
            wins = percent(self.wins if is_gain else 1 - self.wins)
            return f"{better} is better than {other}: {by}, wins on {wins} of images"
        if self.images < FEWEST:
            few = "no image has" if not self.images else f"only {self.images} images have"
            return f"{NO_DIFFERENCE} shown {both}: {few} a finite number of both"
        if self.low is not None and self.high is not None and not self.low <= 0 <= self.high:
            return f"{NO_DIFFERENCE} shown {both}: too few images for as many comparisons as were made"
        is_same = self.low == self.high == 0
        return f"{NO_DIFFERENCE} {both}: equally good on every image" if is_same else f"{NO_DIFFERENCE} shown {both}"

    def gain(self, sign: int = 1) -> str:
        """ "0.430 dB [0.300, 0.570]": by how much `second` is better, or with `sign` -1 `first`."""
        metric = PAIRED[self.metric]
        if self.difference is None:
            return "-"
        value = f"{_figure(sign * self.difference, metric.digits)} {metric.unit}".rstrip()
        if self.low is None or self.high is None:
            return value
        low, high = sorted((sign * self.low, sign * self.high))
        return f"{value} [{_figure(low, metric.digits)}, {_figure(high, metric.digits)}]"

    def as_row(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return vars(self) | {"verdict": self.verdict}

    @staticmethod
    def of_row(row: dict[str, Any]) -> "Comparison":
        """Back from there."""
        return Comparison(**{name: value for name, value in row.items() if name != "verdict"})


def compare_pairs(columns: Columns, pairs: Iterable[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """Every two models, or those `pairs`, by every paired metric that both have; p corrected for all together."""
    compared = [
        compare(metric, (first, columns[first][metric]), (second, columns[second][metric]))
        for first, second in (combinations(columns, 2) if pairs is None else pairs)
        for metric in PAIRED
        if metric in columns[first] and metric in columns[second]
    ]
    return [comparison.as_row() for comparison in corrected(compared)]


def compare(metric: str, first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> Comparison:
    """By one metric two (name, (N,) float64) of the same images; NaN (no number) leaves an image out."""
    known = ~(np.isnan(first[1]) | np.isnan(second[1]))
    before, after = (_badness(PAIRED[metric], values[known]) for _, values in (first, second))
    finite = np.isfinite(before) & np.isfinite(after)
    gains = before[finite] - after[finite]
    low, high = interval(gains)
    return Comparison(
        metric,
        first[0],
        second[0],
        images=len(gains),
        difference=math.fsum(gains) / len(gains) if len(gains) else None,
        low=low,
        high=high,
        wins=float(((after < before) + 0.5 * (after == before)).mean()) if known.any() else 0.5,
        p=chance(gains),
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, each p corrected for all of them being made (Holm 1979)."""
    chances = holm([comparison.p for comparison in comparisons])
    return [replace(one, p=p) for one, p in zip(comparisons, chances, strict=True)]


def percent(share: float) -> str:
    """Whole per cents; 0 % and 100 % only for none and all."""
    return f"{min(99, max(1, round(100 * share))) if 0 < share < 1 else round(100 * share)} %"


def _badness(metric: Metric, values: np.ndarray) -> np.ndarray:
    """To twelve decimals: what is beyond is round-off, which no model should win by."""
    return np.array([metric.badness(value) for value in values.tolist()], dtype=np.float64).round(12)


def _figure(value: float, digits: int) -> str:
    """With the metric's digits, or two of its own where those would show nothing of it."""
    return f"{value:.2g}" if value and abs(value) < 10.0**-digits else f"{value:.{digits}f}"
