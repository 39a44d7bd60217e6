"""The authorities are torch-fidelity and scipy's root of a matrix, which pytorch-fid and clean-fid take."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from vae.errors import InputError
from vae.metrics import set_distances as module
from vae.metrics.set_distances import frechet_distance


def _features(count: int, width: int, seed: int, offset: float = 0.0) -> np.ndarray:
    """Correlated, of unequal scales, never negative: like Inception's."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) * np.geomspace(1, 1e-2, width)
    return np.maximum(generator.standard_normal((count, width)) @ mixing.T + 0.3 + offset, 0)


SETS = {
    "full rank": (_features(400, 48, 0), _features(400, 48, 1)),
    "sets of unequal size": (_features(300, 48, 0), _features(170, 48, 1)),
    "fewer images than features": (_features(20, 48, 0), _features(25, 48, 1)),
    "far fewer, and wide": (_features(60, 512, 0), _features(60, 512, 1)),
    "two images": (_features(2, 48, 0), _features(2, 48, 1)),
    "one rank-deficient": (_features(200, 48, 0), _features(10, 48, 1)),
    "dead features": (_features(200, 48, 0) * (np.arange(48) < 30), _features(200, 48, 1) * (np.arange(48) < 40)),
    "far from zero": (_features(200, 48, 0, offset=1000.0), _features(200, 48, 1, offset=1000.0)),
    "nearly the same": (_features(200, 48, 0), _features(200, 48, 0) + 1e-2 * _features(200, 48, 1)),
    "float32": (_features(200, 48, 0).astype(np.float32), _features(200, 48, 1).astype(np.float32)),
}


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_distances_equal_torch_fidelitys(sets):
    statistics = [fid_features_to_statistics(torch.from_numpy(one.astype(np.float64))) for one in sets]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-5)


def test_distances_equal_scipys_root():
    one, other = SETS["full rank"]
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = np.trace(np.asarray(sqrtm(a @ b))).real
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_a_set_has_no_distance_from_itself_in_any_order(sets):
    for one in sets:
        assert frechet_distance(one, one) == 0.0
        assert frechet_distance(one, one[::-1].copy()) == 0.0


@pytest.mark.parametrize("count", [5, 300])
def test_moving_a_set_costs_the_square_of_the_way(count):
    one, way = _features(count, 16, 0), np.linspace(-1, 1, 16)
    assert frechet_distance(one, one + way) == pytest.approx(np.square(way).sum(), rel=1e-9)


@pytest.mark.parametrize("count", [5, 300])
def test_stretching_a_set_costs_the_square_of_the_stretch(count):
    one = _features(count, 16, 0)
    one -= one.mean(axis=0)
    expected = 0.25 * np.trace(np.cov(one, rowvar=False))
    assert frechet_distance(one, 1.5 * one) == pytest.approx(expected, rel=1e-9)


def test_sets_of_one_point_each_are_as_far_apart_as_the_points():
    zeros, threes = np.zeros((4, 2)), np.full((4, 2), 3.0)
    assert frechet_distance(zeros, zeros) == 0
    assert frechet_distance(zeros, threes) == pytest.approx(18)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    one, other = _features(700, 300, 0), _features(700, 300, 1)
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(frechet_distance(one, other))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(found) == 1


def test_a_long_set_is_read_block_by_block(monkeypatch):
    whole = frechet_distance(*SETS["full rank"])
    monkeypatch.setattr(module, "BLOCK", 64)
    assert frechet_distance(*SETS["full rank"]) == pytest.approx(whole, rel=1e-10)


def test_one_image_is_no_set():
    with pytest.raises(InputError, match="two or more"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
