"""Statistics of per-image metrics: summaries, intervals of a mean, and paired comparisons of two models.

The interval is the bootstrap-t: mean - error * quantiles of the studentised mean, (mean* - mean) / error*, of resamples
(Efron 1981; Hall 1992, "The Bootstrap and Edgeworth Expansion", 3.3). For 50 exponentially distributed values it covers
the true mean in 94 to 95 % of draws. The percentile interval does so in 91 to 92 % and BCa in 93 %: both are too narrow
by sqrt(1 - 1 / n). Heavier tails are covered less often: log-normal (sigma 1.5) and Pareto (exponent 3) ones in 90 to
93 % of draws of 50 values and more, and in 83 to 92 % of draws of 20 and fewer. Beyond `RESAMPLED_UP_TO` values the
expansion of the bootstrap-t replaces it: there the two differ by less than the noise of resampling.

Comparisons are paired, image by image. A mean difference counts as shown only if its sign-flip test, corrected for all
comparisons made (Holm), and its interval agree.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from vae.metrics.registry import PAIRED, Metric

RESAMPLES = 10_000
RESAMPLED_UP_TO = 2_000  # values; more of them take the expansion instead
FEWEST = 8  # values; an interval of fewer would be a guess
QUANTILE = 1.959963984540054  # of the normal distribution, at 97.5 %
SEED = 0
AT_ONCE = 2**20  # random numbers drawn together, which bounds the memory

Summary = dict[str, float | int | None]


def summarise(values: np.ndarray) -> Summary:
    """Summarise (N,) float64: "mean", its 95 % interval "low" to "high", "std", "median", "p5", "p95" and two counts.

    "infinite" counts the infinities and "images" the finite values, which alone enter the rest. NaN means that the
    metric does not apply, and is not counted. An entry is None if it is not defined: without any value, the deviation
    of a single value, the interval of fewer than `FEWEST`.
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
    """Compute the 95 % interval of the mean of (N,) finite float64 values; it is the same at every call.

    A side is None if the values do not bound it: there are fewer than `FEWEST`, or all but a few of them are equal.
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
    """Compute the two-sided p of (N,) paired differences by a sign-flip test (Fisher 1935).

    Under the null hypothesis each difference could as well have the other sign. p is the share of random signs whose
    mean is at least as far from 0. The observed signs are counted too, so p is never 0. Beyond `RESAMPLED_UP_TO` values
    it is the tail of the normal distribution, which is the limit of that share.
    """
    seen = abs(float(differences.sum()))
    if not seen:
        return 1.0
    if len(differences) > RESAMPLED_UP_TO:
        return math.erfc(seen / math.sqrt(2 * float(np.square(differences).sum())))

    # The tolerance counts sums as equal that differ by round-off only.
    generator = np.random.default_rng(SEED)
    as_far = 0
    for rows in _batches(RESAMPLES, len(differences)):
        signs = generator.integers(0, 2, (rows, len(differences)), dtype=np.int8)
        sums = np.where(signs, differences, -differences).sum(axis=1)
        as_far += int((np.abs(sums) >= seen * (1 - 1e-9)).sum())
    return (as_far + 1) / (RESAMPLES + 1)


def holm(chances: list[float]) -> list[float]:
    """Correct each p for all of them being tested together, in the order given (Holm 1979)."""
    corrected = [0.0] * len(chances)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = worst
    return corrected


def _resampled(centred: np.ndarray, resamples: int) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of the studentised mean of resamples.

    A resample of equal values has no spread, so a quantile can be infinite.
    """
    count = len(centred)
    generator = np.random.default_rng(SEED)
    scale = float(np.square(centred).sum())
    studentised = np.empty(resamples)
    done = 0

    # Values are centred, so a resample's mean is its deviation. Round-off of equal values is not a spread.
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
    """Return the same quantiles from the first term of their Cornish-Fisher expansion (Hall 1992, 2.6)."""
    count = len(centred)
    skewness = float((centred**3).mean()) / float(np.square(centred).mean()) ** 1.5
    shift = skewness * (2 * QUANTILE**2 + 1) / (6 * math.sqrt(count))
    return -QUANTILE - shift, QUANTILE - shift


def _batches(rows: int, width: int) -> Iterator[int]:
    """Split `rows` of `width` numbers into parts of at most `AT_ONCE` numbers, and yield the size of each."""
    most = max(1, AT_ONCE // width)
    for start in range(0, rows, most):
        yield min(most, rows - start)


NO_DIFFERENCE = "no difference"  # how every verdict begins that shows none
SHOWN = 0.05  # a difference is shown if the corrected p is below this and the interval excludes 0

Columns = dict[str, dict[str, np.ndarray]]  # {model: {metric: (N,) float64}}, all of the same images in the same order


@dataclass(frozen=True)
class Comparison:
    """How much better `second` is than `first`, on the images that have a number for both.

    `difference` is the mean gain in quality (Metric.badness of `first` minus that of `second`), in the unit of the
    metric, and positive if `second` is better. It is taken over the `images` where both are finite. `low` to `high` is
    its 95 % interval, and `before` and `after` are the metric's means over the same images. `wins` is the share of
    images on which `second` is better, where a tie counts half and infinite quality wins over finite. `p` is two-sided,
    and corrected if the comparison is one of several.

    The counts below are over the `known` images, which have a number for both, infinite ones included:

    - `better` and `worse`: `second` is better, or worse.
    - `badly_worse`: `second` loses `Metric.badly` or more; `worst` is the largest loss.
    - `lost`: only `first` is identical to the image. `gained`: only `second` is. `p_lost` is the two-sided p of the
      difference between these two counts, corrected in the same way.

    `one_sided` images have a number for only one of the two.
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
    known: int = 0  # this and the following are absent in evaluations of earlier versions
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
        """Whether the mean difference is significant."""
        if self.low is None or self.high is None:
            return False
        return self.p < SHOWN and (self.low > 0 or self.high < 0)

    @property
    def sign(self) -> int:
        """1 if `second` is shown to be better, -1 if `first` is, and 0 if neither is or each is in one respect."""
        return _one_of(_sign(self.difference) if self.is_shown else 0, self.sign_of_lost)

    @property
    def sign_of_lost(self) -> int:
        """Like `sign`, by the counts of identical images alone."""
        return _sign(self.gained - self.lost) if self.p_lost < SHOWN else 0

    @property
    def is_few(self) -> bool:
        """Whether the images, or those of them that differ, are too few for their mean to show anything."""
        finite_differ = self.better + self.worse > self.gained + self.lost
        return 0 < self.known < FEWEST or (0 < self.images < FEWEST and finite_differ)

    @property
    def is_worse_on_all(self) -> bool:
        """Whether `second` is worse on every image."""
        return 0 < self.known == self.worse

    @property
    def verdict(self) -> str:
        """The result as a sentence; it begins with `NO_DIFFERENCE` if none is shown."""
        metric = PAIRED[self.metric]
        both = f"between {self.first} and {self.second} in {PAIRED[self.metric].title}"
        alone = [self.identical] if self.lost or self.gained else []
        if self.sign:
            better, other = (self.second, self.first) if self.sign > 0 else (self.first, self.second)
            by = [f"{metric.title} {metric.direction} by {self.gain(self.sign)}"] if self.is_shown else []
            wins = percent(self.wins if self.sign > 0 else 1 - self.wins)
            return f"{better} is better than {other}: {'; '.join([*by, *alone])}, wins on {wins} of images"
        return "; ".join([f"{NO_DIFFERENCE}{self._why_none(both)}", *alone])

    def _why_none(self, both: str) -> str:
        """Say why no difference is shown; `both` names the models and the metric."""
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
        """On how many images only one of the two is without error, in words."""
        counts = f"{self.lost} of {self.known} images with {self.first} alone, {self.gained} with {self.second} alone"
        return f"identical are {counts}"

    def gain(self, sign: int = 1) -> str:
        """Say by how much `second` is better, or `first` if `sign` is -1, as "0.430 dB [0.300, 0.570]"."""
        metric = PAIRED[self.metric]
        if self.difference is None:
            return "-"

        value = f"{_figure(sign * self.difference, metric.digits)} {metric.unit}".rstrip()
        if self.low is None or self.high is None:
            return value
        low, high = sorted((sign * self.low, sign * self.high))
        return f"{value} [{_figure(low, metric.digits)}, {_figure(high, metric.digits)}]"

    def as_row(self) -> dict[str, Any]:
        """Return the comparison as metrics.json stores it."""
        return vars(self) | {"verdict": self.verdict}

    @staticmethod
    def of_row(row: dict[str, Any]) -> "Comparison":
        """Restore a comparison from metrics.json."""
        return Comparison(**{name: value for name, value in row.items() if name != "verdict"})


def compare_pairs(columns: Columns, pairs: Iterable[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """Compare every two models, or those in `pairs`, by every paired metric that both have.

    Each p is corrected for all of these comparisons together. Returns the rows of metrics.json.
    """
    compared = [
        compare(metric, (first, columns[first][metric]), (second, columns[second][metric]))
        for first, second in (combinations(columns, 2) if pairs is None else pairs)
        for metric in PAIRED
        if metric in columns[first] and metric in columns[second]
    ]
    return [comparison.as_row() for comparison in corrected(compared)]


def compare(metric: str, first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> Comparison:
    """Compare two models, (name, (N,) float64) of the same images, by one metric.

    An image with NaN, which is no number, is not compared.
    """
    metric_of = PAIRED[metric]
    known = ~(np.isnan(first[1]) | np.isnan(second[1]))
    before, after = (_badness(metric_of, values[known]) for _, values in (first, second))

    finite = np.isfinite(before) & np.isfinite(after)
    gains = before[finite] - after[finite]
    low, high = interval(gains)
    means = [math.fsum(values[known][finite]) / len(gains) if len(gains) else None for _, values in (first, second)]

    # An infinite value takes no part in a mean. Where only one of the two is infinite, the image is counted instead.
    better = after < before
    worse = after > before
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
    """Correct each p for all comparisons that were made (Holm 1979).

    The tests of the counts of identical images are part of the family.
    """
    counted = [one for one in comparisons if one.lost or one.gained]
    chances = iter(holm([one.p for one in comparisons] + [one.p_lost for one in counted]))
    by_mean = [replace(one, p=next(chances)) for one in comparisons]
    return [replace(one, p_lost=next(chances)) if one.lost or one.gained else one for one in by_mean]


def percent(share: float) -> str:
    """Round to whole per cent; 0 % and 100 % only stand for none and all."""
    return f"{min(99, max(1, round(100 * share))) if 0 < share < 1 else round(100 * share)} %"


def _badness(metric: Metric, values: np.ndarray) -> np.ndarray:
    """Return the badness of each value, rounded to twelve decimals.

    What is beyond them is round-off, by which no model should win.
    """
    return np.array([metric.badness(value) for value in values.tolist()], dtype=np.float64).round(12)


def _losses(metric: Metric, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return by how much badness grew.

    A value better than anybody can see (`Metric.finest`) counts as just that good.
    """
    least = before if metric.finest is None else np.maximum(before, metric.badness(metric.finest))
    return after - least


def _sign(value: float | None) -> int:
    """Return 1, -1 or 0; 0 also for None."""
    return 0 if not value else int(math.copysign(1, value))


def _one_of(first: int, second: int) -> int:
    """Return the sign that both agree on, or that only one has; 0 if they disagree."""
    return 0 if first * second < 0 else first or second


def _figure(value: float, digits: int) -> str:
    """Format with the metric's digits, or with two significant ones if those would show nothing but zeros."""
    return f"{value:.2g}" if value and abs(value) < 10.0**-digits else f"{value:.{digits}f}"
