"""What a column of numbers says: its summary, how sure its mean is, and whether a mean difference is chance.

The interval is the bootstrap-t: mean - error * quantiles of the studentised mean, (mean* - mean) / error*, of resamples
(Efron 1981; Hall 1992, "The Bootstrap and Edgeworth Expansion", 3.3). Of 50 exponentially distributed values it covers
the true mean in 94 to 95 % of draws. The percentile interval does in 91 to 92 % and BCa in 93 %: both are too narrow by
sqrt(1 - 1 / n). Heavier tails are covered less often: log-normal (sigma 1.5) and Pareto (exponent 3) ones in 90 to 93 %
of draws of 50 values and more, in 83 to 92 % of draws of 20 and fewer. Beyond `RESAMPLED_UP_TO` values the expansion of
the bootstrap-t stands for it: there the two differ by less than the noise of resampling.
"""

import math
from collections.abc import Iterator

import numpy as np

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
