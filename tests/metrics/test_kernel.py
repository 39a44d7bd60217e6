"""The authority is torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import mmd2

from vae.errors import InputError
from vae.metrics import set_distances as module
from vae.metrics.set_distances import kernel_distance, kernel_estimate


def _pairs(count: int, width: int, seed: int, moved: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Features of images, and of reconstructions that resemble theirs."""
    generator = np.random.default_rng(seed)
    images, noise = generator.standard_normal((2, count, width))
    return images + 0.5, images + 0.5 + 0.3 * noise + moved


def _authority(x: np.ndarray, y: np.ndarray, estimate: str) -> float:
    a, b, c = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((x, x), (x, y), (y, y)))
    return mmd2(a, b, c, mmd_est=estimate)


@pytest.mark.parametrize(("count", "width"), [(2, 8), (40, 8), (40, 64), (1500, 16)])
def test_distances_equal_torch_fidelitys(count, width):
    pairs = _pairs(count, width, 0)
    assert kernel_distance(*pairs) == pytest.approx(_authority(*pairs, "u-statistic"), rel=1e-9)


def test_of_pairs_the_usual_estimate_is_low_and_ours_is_not():
    """Reconstructions that resemble their images, and are distributed as the images are: the distance is 0."""
    ours, usual = [], []
    for seed in range(300):
        images, noise = np.random.default_rng(seed).standard_normal((2, 20, 8))
        others = 0.8 * images + 0.6 * noise
        ours.append(kernel_distance(images, others))
        usual.append(_authority(images, others, "unbiased"))
    error = np.std(ours) / 300**0.5
    assert abs(np.mean(ours)) < 3 * error
    assert np.mean(usual) < -3 * error


def test_the_standard_error_is_the_spread_over_many_sets():
    estimates = [kernel_estimate(*_pairs(60, 8, seed, moved=0.5)) for seed in range(300)]
    spread = np.std([one.value for one in estimates])
    assert np.mean([one.error for one in estimates]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("count", [2, 33, 1100])
def test_a_set_has_no_distance_from_itself(count):
    images, _ = _pairs(count, 33, 0)
    assert kernel_estimate(images, images.copy()) == (0.0, 0.0)


def test_large_sets_are_the_mean_over_their_parts(monkeypatch):
    images, others = _pairs(30, 8, 0)
    parts = [kernel_distance(images[rows], others[rows]) for rows in (slice(0, 10), slice(10, 20), slice(20, 30))]
    monkeypatch.setattr(module, "MOST", 12)
    assert kernel_distance(images, others) == pytest.approx(np.mean(parts))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    pairs = _pairs(1200, 200, 0)
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(kernel_estimate(*pairs))
    torch.set_num_threads(before)
    assert len(found) == 1


def test_one_image_is_no_set():
    with pytest.raises(InputError, match="two or more"):
        kernel_distance(np.zeros((1, 3)), np.zeros((1, 3)))
