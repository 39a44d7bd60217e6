"""What a column of numbers says: its summary, how sure its mean is, and whether a mean difference is chance.

The interval is the bootstrap-t: mean - error * quantiles of the studentised mean, (mean* - mean) / error*, of resamples
(Efron 1981; Hall 1992, "The Bootstrap and Edgeworth Expansion", 3.3). Of 50 exponentially distributed values it covers
the true mean in 94 to 95 % of draws. The percentile interval does in 91 to 92 % and BCa in 93 %: both are too narrow by
sqrt(1 - 1 / n). Heavier tails are covered less often: log-normal (sigma 1.5) and Pareto (exponent 3) ones in 90 to 93 %
of draws of 50 values and more, in 83 to 92 % of draws of 20 and fewer. Beyond `RESAMPLED_UP_TO` values the expansion of
the bootstrap-t stands for it: there the two differ by less than the noise of resampling.


Which of two models is better, image by image, in figures and in honest words."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from vae.metrics.registry import PAIRED, Metric

RESAMPLES = 10_000
RESAMPLED_UP_TO = 2_000  # values
FEWEST = 8  # values; an interval of fewer would be a guess
QUANTILE = 1.959963984540054  # of the normal distribution, at 97.5 %
SEED = 0
AT_ONCE = 2**20  # random numbers: what bounds the memory

Summary = dict[str, float | int | None]


def summarise(values: np.ndarray) -> Summary:
    """Of (N,) float64: "mean", its 95 % interval "low" to "high", "std", "median", "p5", "p95", "images", "infinite".

    Infinities are counted and left out, NaN (not applicable) is left out; "images" counts the rest. None where there is
    nothing to say: no value, a spread of one, an interval of fewer than `FEWEST`.
    """
    finite = values[np.isfinite(values)]
    counts = {"images": len(finite), "infinite": int(np.isinf(values).sum())}
    if not len(finite):
        return dict.fromkeys(("mean", "low", "high", "std", "median", "p5", "p95")) | counts
    low, high = interval(finite)
    p5, median, p95 = (float(value) for value in np.percentile(finite, (5, 50, 95)))
    std = float(finite.std(ddof=1)) if len(finite) > 1 else None
    mean = math.fsum(finite) / len(finite)
    return {"mean": mean, "low": low, "high": high, "std": std, "median": median, "p5": p5, "p95": p95} | counts


def interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of (N,) finite float64, the same at every call.

    None for a side that the values do not bound: fewer than `FEWEST`, or all but a few of them equal.
    """
    count = len(values)
    if count < FEWEST:
        return None, None
    mean = math.fsum(values) / count
    if values.min() == values.max():
        return mean, mean
    centred = values - mean
    error = float(values.std(ddof=1)) / math.sqrt(count)
    first, last = _resampled(centred, resamples) if count <= RESAMPLED_UP_TO else _expanded(centred)
    low, high = mean - last * error, mean - first * error
    return low if math.isfinite(low) else None, high if math.isfinite(high) else None


def chance(differences: np.ndarray) -> float:
    """Two-sided p of (N,) paired differences, under which each could as well have the other sign (Fisher 1935).

    The share of random signs that give a mean at least as far from 0, the signs that were seen counted in, so never 0.
    Beyond `RESAMPLED_UP_TO` values the normal tail, which that share has as its limit.
    """
    seen = abs(float(differences.sum()))
    if not seen:
        return 1.0
    if len(differences) > RESAMPLED_UP_TO:
        return math.erfc(seen / math.sqrt(2 * float(np.square(differences).sum())))
    generator = np.random.default_rng(SEED)
    as_far = 0
    for rows in _batches(RESAMPLES, len(differences)):
        signs = generator.integers(0, 2, (rows, len(differences)), dtype=np.int8)
        sums = np.where(signs, differences, -differences).sum(axis=1)
        as_far += int((np.abs(sums) >= seen * (1 - 1e-9)).sum())
    return (as_far + 1) / (RESAMPLES + 1)


def holm(chances: list[float]) -> list[float]:
    """Each p corrected for all being asked about together, in the order given (Holm 1979)."""
    corrected, worst = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = worst
    return corrected


def _resampled(centred: np.ndarray, resamples: int) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the studentised mean of resamples; infinite where those have no spread."""
    count = len(centred)
    generator = np.random.default_rng(SEED)
    scale = float(np.square(centred).sum())
    studentised = np.empty(resamples)
    done = 0
    for rows in _batches(resamples, count):
        drawn = centred[generator.integers(0, count, (rows, count), dtype=np.uint32)]
        sums = drawn.sum(axis=1)
        squares = np.square(drawn).sum(axis=1) - sums**2 / count
        spread = np.sqrt(np.where(squares > 1e-12 * scale, squares, 0.0) * count / (count - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised[done : done + rows] = np.nan_to_num(sums / spread, nan=0.0, posinf=math.inf, neginf=-math.inf)
        done += rows
    first, last = np.quantile(studentised, (0.025, 0.975), method="inverted_cdf")
    return float(first), float(last)


def _expanded(centred: np.ndarray) -> tuple[float, float]:
    """The same quantiles by the first term of their Cornish-Fisher expansion (Hall 1992, 2.6)."""
    count = len(centred)
    skewness = float((centred**3).mean()) / float(np.square(centred).mean()) ** 1.5
    shift = skewness * (2 * QUANTILE**2 + 1) / (6 * math.sqrt(count))
    return -QUANTILE - shift, QUANTILE - shift


def _batches(rows: int, width: int) -> Iterator[int]:
    """`rows` in parts of at most `AT_ONCE` numbers."""
    most = max(1, AT_ONCE // width)
    for start in range(0, rows, most):
        yield min(most, rows - start)


NO_DIFFERENCE = "no difference"  # what every verdict begins with that shows none
SHOWN = 0.05  # a difference is shown where the corrected p is below this and the interval leaves out 0

Columns = dict[str, dict[str, np.ndarray]]  # {model: {metric: (N,) float64}}, all of the same images in the same order


@dataclass(frozen=True)
class Comparison:
    """How much better `second` is than `first` on the images that both have a number of.

    `difference` is the mean gain in quality (Metric.badness of `first` less that of `second`) in the metric's unit,
    positive where `second` is better, over the `images` where both are finite; `low` to `high` is its 95 % interval,
    `before` and `after` are the metric's means over the same images.
    `wins` is the share of images on which `second` is better, ties halved; infinite quality wins over finite.
    `p` is two-sided, and corrected where the comparison is one of several.

    Of the `known` images that have a number of both, infinite ones too, `second` is `better` on so many and `worse` on
    so many; `badly_worse` on those where it loses `Metric.badly` or more, `worst` at most. `lost` images are identical
    with `first` alone and `gained` ones with `second` alone; `p_lost` is the chance that these two differ as much, and
    corrected likewise. `one_sided` images have a number of one of the two.
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
    before: float | None = None
    after: float | None = None
    known: int = 0  # evaluations made before these were counted have none of them
    better: int = 0
    worse: int = 0
    badly_worse: int = 0
    worst: float | None = None
    lost: int = 0
    gained: int = 0
    p_lost: float = 1.0
    one_sided: int = 0

    @property
    def is_shown(self) -> bool:
        """Of the mean difference."""
        if self.low is None or self.high is None:
            return False
        return self.p < SHOWN and (self.low > 0 or self.high < 0)

    @property
    def sign(self) -> int:
        """1 where `second` is shown to be better, -1 where `first` is; 0 where neither is, or each in something."""
        return _one_of(_sign(self.difference) if self.is_shown else 0, self.sign_of_lost)

    @property
    def sign_of_lost(self) -> int:
        """The same of identical images alone."""
        return _sign(self.gained - self.lost) if self.p_lost < SHOWN else 0

    @property
    def is_few(self) -> bool:
        """Whether images that differ, or all of them, are too few to show anything by their mean."""
        finite_differ = self.better + self.worse > self.gained + self.lost
        return 0 < self.known < FEWEST or (0 < self.images < FEWEST and finite_differ)

    @property
    def is_worse_on_all(self) -> bool:
        return 0 < self.known == self.worse

    @property
    def verdict(self) -> str:
        metric, both = PAIRED[self.metric], f"between {self.first} and {self.second} in {PAIRED[self.metric].title}"
        alone = [self.identical] if self.lost or self.gained else []
        if self.sign:
            better, other = (self.second, self.first) if self.sign > 0 else (self.first, self.second)
            by = [f"{metric.title} {metric.direction} by {self.gain(self.sign)}"] if self.is_shown else []
            wins = percent(self.wins if self.sign > 0 else 1 - self.wins)
            return f"{better} is better than {other}: {'; '.join([*by, *alone])}, wins on {wins} of images"
        return "; ".join([f"{NO_DIFFERENCE}{self._why_none(both)}", *alone])

    def _why_none(self, both: str) -> str:
        is_mixed = self.is_shown and bool(self.sign_of_lost)
        if is_mixed:
            return f" shown {both}: better by {self.gain()} where neither is identical, and the other way round there"
        if self.images < FEWEST:
            few = "no image has" if not self.images else f"only {self.images} images have"
            return f" shown {both}: {few} a finite number of both"
        if self.low is not None and self.high is not None and not self.low <= 0 <= self.high:
            return f" shown {both}: too few images for as many comparisons as were made"
        if self.lost or self.gained or not self.low == self.high == 0:
            return f" shown {both}"
        of_both = " that both have a number of" if self.one_sided else ""
        return f" {both}: equally good on every image{of_both}"

    @property
    def identical(self) -> str:
        """Of how many images either is without an error where the other is not."""
        counts = f"{self.lost} of {self.known} images with {self.first} alone, {self.gained} with {self.second} alone"
        return f"identical are {counts}"

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
    metric_of = PAIRED[metric]
    known = ~(np.isnan(first[1]) | np.isnan(second[1]))
    before, after = (_badness(metric_of, values[known]) for _, values in (first, second))
    finite = np.isfinite(before) & np.isfinite(after)
    gains = before[finite] - after[finite]
    low, high = interval(gains)
    means = [math.fsum(values[known][finite]) / len(gains) if len(gains) else None for _, values in (first, second)]

    # An infinite number takes no part in a mean: where one of the two has it alone, that is counted.
    better, worse = after < before, after > before
    gained, lost = int((better & ~finite).sum()), int((worse & ~finite).sum())
    losses = _losses(metric_of, before[worse], after[worse])
    return Comparison(
        metric,
        first[0],
        second[0],
        images=len(gains),
        difference=math.fsum(gains) / len(gains) if len(gains) else None,
        low=low,
        high=high,
        wins=float((better + 0.5 * (after == before)).mean()) if known.any() else 0.5,
        p=chance(gains),
        before=means[0],
        after=means[1],
        known=int(known.sum()),
        better=int(better.sum()),
        worse=int(worse.sum()),
        badly_worse=int((losses >= metric_of.badly).sum()),
        worst=float(losses[np.isfinite(losses)].max(initial=0.0)),
        lost=lost,
        gained=gained,
        p_lost=chance(np.repeat([1.0, -1.0], [gained, lost])),
        one_sided=int((np.isnan(first[1]) != np.isnan(second[1])).sum()),
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, each p corrected for all of them being made (Holm 1979), counts of identical images among them."""
    counted = [one for one in comparisons if one.lost or one.gained]
    chances = iter(holm([one.p for one in comparisons] + [one.p_lost for one in counted]))
    by_mean = [replace(one, p=next(chances)) for one in comparisons]
    return [replace(one, p_lost=next(chances)) if one.lost or one.gained else one for one in by_mean]


def percent(share: float) -> str:
    """Whole per cents; 0 % and 100 % only for none and all."""
    return f"{min(99, max(1, round(100 * share))) if 0 < share < 1 else round(100 * share)} %"


def _badness(metric: Metric, values: np.ndarray) -> np.ndarray:
    """To twelve decimals: what is beyond is round-off, which no model should win by."""
    return np.array([metric.badness(value) for value in values.tolist()], dtype=np.float64).round(12)


def _losses(metric: Metric, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of badness; what was better than anybody sees counts as that good."""
    least = before if metric.finest is None else np.maximum(before, metric.badness(metric.finest))
    return after - least


def _sign(value: float | None) -> int:
    return 0 if not value else int(math.copysign(1, value))


def _one_of(first: int, second: int) -> int:
    """The sign that both agree on, or that one alone has."""
    return 0 if first * second < 0 else first or second


def _figure(value: float, digits: int) -> str:
    """With the metric's digits, or two of its own where those would show nothing of it."""
    return f"{value:.2g}" if value and abs(value) < 10.0**-digits else f"{value:.{digits}f}"
