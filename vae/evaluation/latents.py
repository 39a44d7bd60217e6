"""What latents are like: their scale for diffusion models, what each channel carries, how they are laid out.

`describe` reduces one image to small sums, `combine` adds those of all images in their order. So the result does not
depend on which process saw which image. It agrees with `vae.latents.LatentStatistics`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from vae.evaluation.spectra import (
    LAGS,
    Scatter,
    correlations,
    effective_rank,
    frequencies,
    neighbours,
    radial_power,
    scatter,
)
from vae.latents import ACTIVE
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian

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
