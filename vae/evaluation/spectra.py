"""Sums that say how latents are laid out in space and among channels: small, in float64, and addable over images.

Nothing here goes through BLAS, whose order of addition depends on the number of threads.
"""

from dataclasses import dataclass

import numpy as np

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
