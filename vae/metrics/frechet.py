"""The Frechet distance of two sets of features, taken as Gaussians.

Dowson and Landau (1982): |m - n|^2 + tr(S + T - 2 (S T)^(1/2)). With S = A^T A and T = B^T B, the trace of that root is
the sum of the singular values of A B^T, which needs no root of a matrix and is exact where S and T have no full rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vae.errors import require

BLOCK = 4096
Features = Tensor | np.ndarray


def frechet_distance(images: Features, reconstructions: Features) -> float:
    """Features (N, D) and (M, D), at least two of each -> distance from 0, the same bits for the same rows.

    The covariances are those of samples, divided by N - 1. Grows as N falls: distances compare at the same N only.
    """
    for given in (images, reconstructions):
        require(len(given) > 1, f"{len(given)} images", "two or more for a Frechet distance")
    with one_thread():
        (mean, root), (other_mean, other_root) = _moments(images), _moments(reconstructions)
        traces = root.square().sum() + other_root.square().sum()
        shared = torch.linalg.svdvals(root @ other_root.T).sum()
        distance = (mean - other_mean).square().sum() + traces - 2.0 * shared
        assert torch.isfinite(distance)
        rounding = torch.finfo(torch.float64).eps * traces * len(mean)
        return distance.item() if distance > rounding else 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order whatever the number of processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _moments(features: Features) -> tuple[Tensor, Tensor]:
    """(N, D) -> the mean (D,) and a root A (at most D, D) of the covariance A^T A, float64, in bounded memory."""
    blocks = torch.as_tensor(features).split(BLOCK)
    count = sum(map(len, blocks))
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / count
    root = mean.new_empty(0, len(mean))
    for block in blocks:
        root = torch.linalg.qr(torch.cat([root, block.double() - mean]), mode="r").R
    return mean, root / (count - 1) ** 0.5
