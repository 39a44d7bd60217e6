"""The kernel distance of two sets of features: the squared maximum mean discrepancy, unbiased.

Binkowski et al., "Demystifying MMD GANs" (2018): the kernel (x . y / D + 1)^3. An image and its reconstruction are not
independent, so pairs of the two are left out of the mean between the sets (Gretton et al., "A Kernel Two-Sample Test",
2012, equation 4; torch-fidelity's "u-statistic"). That is unbiased for sets of pairs too, and 0 of a set with itself.
"""

from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from vae.errors import require
from vae.metrics.frechet import Features, one_thread

BLOCK = 1024
MOST = 5000  # beyond, the mean over parts of the set: the whole of 50,000 would take an hour of one core


class Estimate(NamedTuple):
    value: float
    error: float  # its standard error


def kernel_distance(images: Features, reconstructions: Features) -> float:
    """The value of `kernel_estimate`."""
    return kernel_estimate(images, reconstructions).value


def kernel_estimate(images: Features, reconstructions: Features) -> Estimate:
    """Features (N, D) of images and, row by row, of their reconstructions, at least two -> distance, about 0 or more.

    The same bits for the same rows. Sets of more than 5000 are cut into equal parts, and the mean over these taken. The
    standard error is that of the first order: each image's share in the distance is one observation.
    """
    require(len(images) > 1, f"{len(images)} images", "two or more for a kernel distance")
    x, y = torch.as_tensor(images), torch.as_tensor(reconstructions)
    assert x.shape == y.shape
    parts = -(-len(x) // MOST)
    with one_thread():
        pairs = zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)
        shares = torch.cat([_shares(a.double(), b.double()) for a, b in pairs])
        return Estimate(shares.mean().item(), (2.0 * shares.std() / len(shares) ** 0.5).item())


def _shares(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) twice -> (N,): of k(x, x') + k(y, y') - k(x, y') - k(y, x') each pair's mean over all other pairs."""
    sums = x.new_zeros(len(x))
    blocks = [slice(start, start + BLOCK) for start in range(0, len(x), BLOCK)]
    for a, b in combinations_with_replacement(blocks, 2):
        kernels = _kernel(x[a], x[b]) + _kernel(y[a], y[b]) - _kernel(x[a], y[b]) - _kernel(y[a], x[b])
        if a is b:
            kernels.fill_diagonal_(0.0)
        else:
            sums[b] += kernels.sum(dim=0)
        sums[a] += kernels.sum(dim=1)
    return sums / (len(x) - 1)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
