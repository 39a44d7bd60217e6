"""Statistics of latents: their scale for diffusion models, what each channel carries, and their layout in space.

`describe` reduces one image to small float64 sums, and `combine` adds those of all images in their order. So the result
does not depend on which process saw which image. It agrees with `vae.latents.LatentStatistics`.

Nothing here goes through BLAS, because the order in which BLAS adds depends on the number of threads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae.latents import ACTIVE
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian

BINS = 16  # bins of radial frequency, from 0 to 0.5 cycles per latent cell
LAGS = (1, 2, 4)  # distances of neighbours, in latent cells


@dataclass(frozen=True)
class Scatter:
    """Sums over vectors of d numbers: count, mean (..., d), and summed products of deviations from it (..., d, d)."""

    count: np.ndarray
    mean: np.ndarray
    products: np.ndarray

    def merged(self, other: "Scatter") -> "Scatter":
        """Combine with the sums of other vectors (Chan et al., 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        apart = other.mean - self.mean
        mean = self.mean + apart * share[..., None]
        between = apart[..., :, None] * apart[..., None, :] * (self.count * share)[..., None, None]
        return Scatter(count, mean, self.products + other.products + between)


def scatter(vectors: np.ndarray) -> Scatter:
    """Sum over vectors, which are columns: (..., d, n) has n of them."""
    count = vectors.shape[-1]
    mean = vectors.sum(axis=-1) / max(count, 1)
    distances = vectors - mean[..., None]
    return Scatter(np.array(float(count)), mean, np.einsum("...in,...jn->...ij", distances, distances))


def neighbours(planes: np.ndarray) -> Scatter:
    """Sum over pairs of values that lie `LAGS` cells apart in a row or a column of planes (C, h, w).

    Returns count (L, 1), mean (L, C, 2) and products (L, C, 2, 2) for L lags.
    """
    each = [scatter(_pairs(planes, lag)) for lag in LAGS]
    counts = np.stack([one.count for one in each])[:, None]
    return Scatter(counts, np.stack([one.mean for one in each]), np.stack([one.products for one in each]))


def radial_power(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the squared cosine coefficients of planes (C, h, w) by radial frequency.

    Returns the sums and the number of coefficients in each bin, both (BINS,).

    The orthonormal DCT-II does not leak at borders whose values differ, as the Fourier transform of a photograph would.
    White noise of variance v has v in every bin, whatever the size. The mean and the corners beyond 0.5 cycles per cell
    are not counted.
    """
    height, width = planes.shape[1:]
    by_row = np.einsum("ki,cij->ckj", _cosines(height), planes)
    coefficients = np.einsum("lj,ckj->ckl", _cosines(width), by_row)

    # The radius is the distance from the mean in the plane of the two frequencies.
    vertical, horizontal = np.arange(height) / (2 * height), np.arange(width) / (2 * width)
    radius = np.hypot(vertical[:, None], horizontal[None, :])

    counted = (radius > 0) & (radius < 0.5)
    bins = (radius[counted] * 2 * BINS).astype(np.int64)
    energies = np.square(coefficients).sum(axis=0)[counted]
    count = np.bincount(bins, minlength=BINS) * len(planes)
    return np.bincount(bins, weights=energies, minlength=BINS), count.astype(np.float64)


def frequencies() -> np.ndarray:
    """Return the middle of each bin, (BINS,), in cycles per latent cell."""
    return (np.arange(BINS) + 0.5) / (2 * BINS)


def effective_rank(products: np.ndarray) -> float | None:
    """Count the directions that vectors really use: exp of the entropy of their shares of the variance.

    This is the effective rank of the covariance matrix (Roy and Vetterli, "The effective rank", 2007). `products` are
    the vectors' summed products, (d, d). Returns None if all vectors are equal.
    """
    values = np.linalg.eigvalsh(products).clip(min=0.0)
    if not values.sum() > 0:
        return None
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def correlations(products: np.ndarray) -> np.ndarray:
    """Turn summed products (..., d, d) into Pearson's correlation of each pair; NaN if one of the two does not vary."""
    spread = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    spread = np.where(spread > 0, spread, np.nan)
    return (products / (spread[..., :, None] * spread[..., None, :])).clip(-1.0, 1.0)


def _pairs(planes: np.ndarray, lag: int) -> np.ndarray:
    """Return all pairs of values that lie `lag` cells apart, as columns: (C, 2, n)."""
    channels = len(planes)
    first = [planes[:, :-lag, :], planes[:, :, :-lag]]
    second = [planes[:, lag:, :], planes[:, :, lag:]]
    return np.stack([np.concatenate([part.reshape(channels, -1) for part in side], 1) for side in (first, second)], 1)


def _cosines(size: int) -> np.ndarray:
    """Return the rows of the orthonormal DCT-II, (size, size)."""
    order = np.arange(size)
    rows = np.cos(np.pi * order[:, None] * (2 * order[None, :] + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


COLLAPSED = 0.01  # nats per latent element: a channel with a lower KL tells the decoder nothing
NOISY = 0.9  # of a channel's standard deviation: if the posterior's own is above, the channel is mostly noise
CLAMPED = 0.01  # share of log-variances at a bound that is worth a warning

Sums = dict[str, np.ndarray]


def describe(posterior: DiagonalGaussian) -> Sums:
    """Reduce the posterior of one image, moments (1, C, h, w), to float64 sums: C^2 + 21 C + 37 numbers.

    The sums of images of different sizes can be combined, if C is the same.
    """
    assert len(posterior.mean) == 1
    mean = posterior.mean[0].detach().cpu().double().numpy()
    logvar = posterior.logvar[0].detach().cpu().double().numpy()
    variance = np.exp(logvar)
    lowest, highest = LOGVAR_RANGE

    channels = scatter(mean.reshape(len(mean), -1))
    lags = neighbours(mean)
    energy, coefficients = radial_power(mean)
    return {
        "count": channels.count,
        "mean": channels.mean,
        "products": channels.products,
        "noise": variance.sum(axis=(1, 2)),
        "kl": 0.5 * (np.square(mean) + variance - 1.0 - logvar).sum(axis=(1, 2)),
        "clamped": np.array(float(((logvar <= lowest) | (logvar >= highest)).sum())),
        "energy": energy,
        "coefficients": coefficients,
        "lag_count": lags.count,
        "lag_mean": lags.mean,
        "lag_products": lags.products,
    }


def combine(images: Iterable[Sums], *, has_width: bool = True) -> dict[str, Any] | None:
    """Combine the descriptions of images, in order, into plain values for JSON; a value that is not defined is None.

    Moments are those of posterior samples, so they include both the means and the noise (law of total variance):
    `mean`, `std`, `latents_mean` and `latents_std` per channel, `scaling_factor` = 1 / std, `shift_factor` = mean.
    `kl_per_channel` is in nats per latent element. `spectrum`, `autocorrelation`, `correlation` and `effective_rank`
    describe the posterior means alone.

    Images whose moments are not finite are counted and skipped. Returns None if no image is left. `has_width` is
    False where posteriors have none by design, and so no KL.
    """
    total: Sums | None = None
    seen = not_finite = 0
    for sums in images:
        if all(np.isfinite(values).all() for values in sums.values()):
            seen += 1
            total = sums if total is None else _added(total, sums)
        else:
            not_finite += 1

    if total is None:
        return None
    result = {"images": seen, "not_finite": not_finite} | _moments(total) | _layout(total)
    return result | {"warnings": _warnings(result, has_width=has_width)} | ({} if has_width else {"kl": None})


def _added(a: Sums, b: Sums) -> Sums:
    """Add the sums of two sets of images."""
    channels = Scatter(a["count"], a["mean"], a["products"]).merged(Scatter(b["count"], b["mean"], b["products"]))
    lags = _lags(a).merged(_lags(b))
    plain = {name: a[name] + b[name] for name in ("noise", "kl", "clamped", "energy", "coefficients")}
    together = {"count": channels.count, "mean": channels.mean, "products": channels.products}
    return together | plain | {"lag_count": lags.count, "lag_mean": lags.mean, "lag_products": lags.products}


def _lags(sums: Sums) -> Scatter:
    """Return the sums over pairs of neighbours as a `Scatter`."""
    return Scatter(sums["lag_count"], sums["lag_mean"], sums["lag_products"])


def _moments(total: Sums) -> dict[str, Any]:
    """Compute scale, KL and activity from the sums of all images."""
    count, mean = total["count"], total["mean"]

    of_means = total["products"].diagonal() / count
    noise = total["noise"] / count
    variance = of_means + noise

    # The one scaling factor serves all channels, so the spread of their means is part of the deviation.
    std = float(np.sqrt((variance + np.square(mean - mean.mean())).mean()))
    return {
        "values_per_channel": int(count),
        "mean": float(mean.mean()),
        "std": std,
        "scaling_factor": 1.0 / std if std > 0 else None,
        "shift_factor": float(mean.mean()),
        "latents_mean": mean.tolist(),
        "latents_std": np.sqrt(variance).tolist(),
        "posterior_std": np.sqrt(noise).tolist(),
        "kl": float((total["kl"] / count).mean()),
        "kl_per_channel": (total["kl"] / count).tolist(),
        "channel_is_active": (of_means > ACTIVE).tolist(),
        "active_channels": int((of_means > ACTIVE).sum()),
        "clamped_share": float(total["clamped"] / (count * len(mean))),
    }


def _layout(total: Sums) -> dict[str, Any]:
    """Compute spectrum, correlations and effective rank of the posterior means from the sums of all images."""
    with np.errstate(invalid="ignore"):
        power = total["energy"] / total["coefficients"]
        halves = total["energy"].reshape(2, -1).sum(1) / total["coefficients"].reshape(2, -1).sum(1)

    matrix = correlations(total["products"])

    apart = np.abs(matrix[~np.eye(len(matrix), dtype=bool)])
    along = correlations(_lags(total).products)[..., 0, 1]  # (lags, channels)
    return {
        "spectrum": {
            "frequencies": frequencies().tolist(),
            "power": _plain(power),
            "noise": float((total["noise"] / total["count"]).mean()),
            "high_to_low": _ratio(halves[1], halves[0]),
        },
        "autocorrelation": {str(lag): _mean(values) for lag, values in zip(LAGS, along, strict=True)},
        "correlation": [_plain(row) for row in matrix],
        "mean_absolute_correlation": _mean(apart),
        "effective_rank": effective_rank(total["products"]),
    }


def _warnings(result: dict[str, Any], *, has_width: bool) -> list[str]:
    """Say in sentences what is wrong with the latents."""
    noise, std = np.array(result["posterior_std"]), np.array(result["latents_std"])
    collapsed = np.array(result["kl_per_channel"]) < COLLAPSED
    noisy = ~collapsed & (noise > NOISY * std)
    still = ~collapsed & ~noisy & ~np.array(result["channel_is_active"])
    said = [
        (collapsed, f"collapsed: below {COLLAPSED:g} nats per element, the decoder learns nothing from it"),
        (noisy, f"nearly all noise: the posterior's own spread is over {NOISY:.0%} of the channel's"),
        (still, f"hardly used: the variance of its means over the images is not above {ACTIVE:g}"),
    ]

    words = [f"{_named(which)} {what}" for which, what in said if which.any()]
    if result["clamped_share"] > CLAMPED and has_width:
        lowest, highest = LOGVAR_RANGE
        words.append(f"{result['clamped_share']:.0%} of log-variances are at the bounds {lowest:g} and {highest:g}")
    if result["scaling_factor"] is None:
        words.append("all latents are the same number: there is no scaling factor")
    return words


def _named(which: np.ndarray) -> str:
    """Name the channels that `which` (C,) marks; channels are counted from 0."""
    if which.all() and len(which) > 1:
        return f"each of the {len(which)} channels is"
    numbers = np.flatnonzero(which).tolist()
    many = f"each of channels {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} is"
    return many if len(numbers) > 1 else f"channel {numbers[0]} is"


def _plain(values: np.ndarray) -> list[float | None]:
    """Turn an array into a list for JSON, with None for what is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _mean(values: np.ndarray) -> float | None:
    """Average the finite values; None if there are none."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def _ratio(a: float, b: float) -> float | None:
    """Divide `a` by `b`; None if `b` is not positive or `a` is not finite."""
    return float(a / b) if np.isfinite(a) and b > 0 else None
