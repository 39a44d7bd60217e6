"""Sums that say how latents are laid out in space and among channels: small, in float64, and addable over images.

Nothing here goes through BLAS, whose order of addition depends on the number of threads.


What latents are like: their scale for diffusion models, what each channel carries, how they are laid out.

`describe` reduces one image to small sums, `combine` adds those of all images in their order. So the result does not
depend on which process saw which image. It agrees with `vae.latents.LatentStatistics`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae.latents import ACTIVE
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian

BINS = 16  # of radial frequency, from 0 to 0.5 cycles per latent cell
LAGS = (1, 2, 4)  # cells


@dataclass(frozen=True)
class Scatter:
    """Of vectors of d numbers: how many, their mean (..., d), and summed products of distances from it (..., d, d)."""

    count: np.ndarray
    mean: np.ndarray
    products: np.ndarray

    def merged(self, other: "Scatter") -> "Scatter":
        """Of both together (Chan et al., 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        apart = other.mean - self.mean
        mean = self.mean + apart * share[..., None]
        between = apart[..., :, None] * apart[..., None, :] * (self.count * share)[..., None, None]
        return Scatter(count, mean, self.products + other.products + between)


def scatter(vectors: np.ndarray) -> Scatter:
    """Vectors as columns, (..., d, n)."""
    count = vectors.shape[-1]
    mean = vectors.sum(axis=-1) / max(count, 1)
    distances = vectors - mean[..., None]
    return Scatter(np.array(float(count)), mean, np.einsum("...in,...jn->...ij", distances, distances))


def neighbours(planes: np.ndarray) -> Scatter:
    """Of planes (C, h, w): per lag and channel, the pairs of values that far apart in a row or a column.

    count (L, 1), mean (L, C, 2), products (L, C, 2, 2).
    """
    each = [scatter(_pairs(planes, lag)) for lag in LAGS]
    counts = np.stack([one.count for one in each])[:, None]
    return Scatter(counts, np.stack([one.mean for one in each]), np.stack([one.products for one in each]))


def radial_power(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of planes (C, h, w): summed squares of the cosine coefficients per bin, and how many they are; (BINS,) each.

    The orthonormal DCT-II has no leakage from borders that do not meet, as a Fourier transform of photographs would.
    White noise of variance v has v in every bin, whatever the size. The mean and the corners beyond 0.5 cycles per cell
    are left out.
    """
    height, width = planes.shape[1:]
    by_row = np.einsum("ki,cij->ckj", _cosines(height), planes)
    coefficients = np.einsum("lj,ckj->ckl", _cosines(width), by_row)
    vertical, horizontal = np.arange(height) / (2 * height), np.arange(width) / (2 * width)
    radius = np.hypot(vertical[:, None], horizontal[None, :])
    counted = (radius > 0) & (radius < 0.5)
    bins = (radius[counted] * 2 * BINS).astype(np.int64)
    energies = np.square(coefficients).sum(axis=0)[counted]
    count = np.bincount(bins, minlength=BINS) * len(planes)
    return np.bincount(bins, weights=energies, minlength=BINS), count.astype(np.float64)


def frequencies() -> np.ndarray:
    """The middle of each bin, in cycles per latent cell."""
    return (np.arange(BINS) + 0.5) / (2 * BINS)


def effective_rank(products: np.ndarray) -> float | None:
    """How many directions vectors really use: exp of the entropy of the shares that these have of the variance.

    Roy and Vetterli, "The effective rank" (2007), of the covariance matrix. `products` (d, d) are the vectors' summed
    products. None where all vectors are the same.
    """
    values = np.linalg.eigvalsh(products).clip(min=0.0)
    if not values.sum() > 0:
        return None
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def correlations(products: np.ndarray) -> np.ndarray:
    """Products (..., d, d) -> Pearson's correlation of each two; NaN where one does not vary."""
    spread = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    spread = np.where(spread > 0, spread, np.nan)
    return (products / (spread[..., :, None] * spread[..., None, :])).clip(-1.0, 1.0)


def _pairs(planes: np.ndarray, lag: int) -> np.ndarray:
    """(C, 2, n)"""
    channels = len(planes)
    first = [planes[:, :-lag, :], planes[:, :, :-lag]]
    second = [planes[:, lag:, :], planes[:, :, lag:]]
    return np.stack([np.concatenate([part.reshape(channels, -1) for part in side], 1) for side in (first, second)], 1)


def _cosines(size: int) -> np.ndarray:
    """The rows of the orthonormal DCT-II, (size, size)."""
    order = np.arange(size)
    rows = np.cos(np.pi * order[:, None] * (2 * order[None, :] + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


COLLAPSED = 0.01  # nats per latent element: a channel with less tells the decoder nothing
NOISY = 0.9  # of a channel's standard deviation: where the posterior's own is more, noise has taken the channel over
CLAMPED = 0.01  # of all log-variances

Sums = dict[str, np.ndarray]


def describe(posterior: DiagonalGaussian) -> Sums:
    """Of the posterior of one image, moments (1, C, h, w): float64 sums, C^2 + 21 C + 37 numbers.

    Sums of images are combined with those of any other size, but the same C.
    """
    assert len(posterior.mean) == 1
    mean = posterior.mean[0].detach().cpu().double().numpy()
    logvar = posterior.logvar[0].detach().cpu().double().numpy()
    variance = np.exp(logvar)
    lowest, highest = LOGVAR_RANGE
    channels, lags = scatter(mean.reshape(len(mean), -1)), neighbours(mean)
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


def combine(images: Iterable[Sums], *, is_tiny: bool = False) -> dict[str, Any] | None:
    """Of the descriptions of images, in order: plain numbers for JSON, None for what is not defined.

    Moments are of posterior samples, means and noise together (law of total variance): `mean`, `std`, `latents_mean`
    and `latents_std` per channel, `scaling_factor` = 1 / std, `shift_factor` = mean. `kl_per_channel` is in nats per
    latent element. `spectrum`, `autocorrelation`, `correlation` and `effective_rank` are of the posterior means. Images
    whose moments are not finite are counted and left out; None where nothing is left. A tiny autoencoder's posteriors
    have no width, on purpose, and so no KL.
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
    return result | {"warnings": _warnings(result, is_tiny=is_tiny)} | ({"kl": None} if is_tiny else {})


def _added(a: Sums, b: Sums) -> Sums:
    channels = Scatter(a["count"], a["mean"], a["products"]).merged(Scatter(b["count"], b["mean"], b["products"]))
    lags = _lags(a).merged(_lags(b))
    plain = {name: a[name] + b[name] for name in ("noise", "kl", "clamped", "energy", "coefficients")}
    together = {"count": channels.count, "mean": channels.mean, "products": channels.products}
    return together | plain | {"lag_count": lags.count, "lag_mean": lags.mean, "lag_products": lags.products}


def _lags(sums: Sums) -> Scatter:
    return Scatter(sums["lag_count"], sums["lag_mean"], sums["lag_products"])


def _moments(total: Sums) -> dict[str, Any]:
    count, mean = total["count"], total["mean"]
    of_means, noise = total["products"].diagonal() / count, total["noise"] / count
    variance = of_means + noise
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


def _warnings(result: dict[str, Any], *, is_tiny: bool) -> list[str]:
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
    if result["clamped_share"] > CLAMPED and not is_tiny:
        lowest, highest = LOGVAR_RANGE
        words.append(f"{result['clamped_share']:.0%} of log-variances are at the bounds {lowest:g} and {highest:g}")
    if result["scaling_factor"] is None:
        words.append("all latents are the same number: there is no scaling factor")
    return words


def _named(which: np.ndarray) -> str:
    """Channels are counted from 0."""
    if which.all() and len(which) > 1:
        return f"each of the {len(which)} channels is"
    numbers = np.flatnonzero(which).tolist()
    many = f"each of channels {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} is"
    return many if len(numbers) > 1 else f"channel {numbers[0]} is"


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _mean(values: np.ndarray) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if np.isfinite(a) and b > 0 else None
