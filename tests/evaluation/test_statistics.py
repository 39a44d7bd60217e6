"""Summaries, intervals and chances: against scipy, by law, and by how often they are right."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vae.evaluation import statistics
from vae.evaluation.statistics import FEWEST, RESAMPLED_UP_TO, RESAMPLES, chance, holm, interval, summarise

Draw = Callable[[np.random.Generator, int], np.ndarray]
DRAWS = 1000
POPULATIONS: dict[str, tuple[Draw, float]] = {  # (how values are drawn, their true mean)
    "normal, as PSNR": (lambda generator, count: generator.normal(29, 3.9, count), 29.0),
    "gamma, as LPIPS": (lambda generator, count: generator.gamma(4, 0.02, count), 0.08),
    "beta, as SSIM": (lambda generator, count: generator.beta(8, 1.2, count), 8 / 9.2),
    "exponential": (lambda generator, count: generator.exponential(1.0, count), 1.0),
}
HEAVY: dict[str, tuple[Draw, float]] = {
    "log-normal": (lambda generator, count: generator.lognormal(0.0, 1.5, count), math.exp(1.125)),
}


def _covered(population: str, count: int, resamples: int = 1000) -> float:
    draw, truth = (POPULATIONS | HEAVY)[population]
    generator = np.random.default_rng(2026)
    covered = 0
    for _ in range(DRAWS):
        low, high = interval(draw(generator, count), resamples)
        covered += low is not None and high is not None and low <= truth <= high
    return covered / DRAWS


@pytest.mark.parametrize("population", POPULATIONS)
def test_intervals_of_50_values_cover_the_truth_in_93_to_97_of_100_draws(population):
    assert 0.93 <= _covered(population, 50) <= 0.97


def test_intervals_of_20_values_do_too():
    assert 0.93 <= _covered("gamma, as LPIPS", 20) <= 0.97


@pytest.mark.parametrize(("population", "count", "least"), [("log-normal", 50, 0.88), ("log-normal", 8, 0.80)])
def test_intervals_of_heavy_tails_cover_the_truth_less_often_and_the_docs_say_so(population, count, least):
    assert least <= _covered(population, count) <= 0.94
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert "it covers in 90 to 93, and of 20 or fewer in 83 to 92" in page


@pytest.mark.parametrize("population", ["normal, as PSNR", "exponential"])
def test_intervals_of_6000_values_do_too(population):
    assert 0.93 <= _covered(population, 6000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("population", POPULATIONS)
def test_intervals_of_all_resamples_do_too(population):
    assert 0.93 <= _covered(population, 50, RESAMPLES) <= 0.97


def test_an_interval_of_normal_values_is_that_of_student():
    values = np.random.default_rng(1).normal(29, 3.9, 200)
    low, high = interval(values)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.02 * (expected[1] - expected[0]))


def test_where_resampling_ends_its_expansion_says_the_same(monkeypatch):
    values = np.random.default_rng(1).exponential(1.0, RESAMPLED_UP_TO)
    resampled = interval(values)
    monkeypatch.setattr(statistics, "RESAMPLED_UP_TO", 0)
    low, high = interval(values)
    assert low is not None
    assert high is not None
    assert resampled == pytest.approx((low, high), abs=0.02 * (high - low))


def test_an_interval_is_the_same_at_every_call_and_follows_scale_and_place():
    values = np.random.default_rng(1).gamma(4, 1, 60)
    low, high = interval(values)
    assert interval(values) == (low, high)
    assert low is not None
    assert high is not None
    assert interval(10 * values + 3) == pytest.approx((10 * low + 3, 10 * high + 3))
    assert interval(-values) == pytest.approx((-high, -low), rel=1e-2)


def test_equal_values_have_an_interval_of_no_width():
    assert interval(np.full(50, 0.1)) == (0.1, 0.1)


def test_a_side_that_the_values_do_not_bound_is_none():
    """A single value apart from 49 equal ones is absent from a third of the resamples."""
    values = np.zeros(50)
    values[7] = 1.0
    low, high = interval(values)
    assert low is not None
    assert high is None
    assert interval(np.arange(FEWEST - 1.0)) == (None, None)


def test_values_around_equal_ones_raise_no_warning():
    """Resamples of nothing but the mean have neither spread nor distance."""
    values = np.zeros(40)
    values[:4] = 1.0, -1.0, 2.0, -2.0
    low, high = interval(values)
    assert low is not None
    assert high is not None
    assert low < 0 < high


def test_a_summary_equals_numpy():
    values = np.random.default_rng(1).normal(29, 3.9, 100)
    summary = summarise(values)
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["std"] == pytest.approx(values.std(ddof=1))
    assert [summary[key] for key in ("p5", "median", "p95")] == pytest.approx(np.percentile(values, (5, 50, 95)))
    assert (summary["images"], summary["infinite"]) == (100, 0)


def test_infinities_are_counted_and_left_out_and_nan_is_left_out():
    values = np.random.default_rng(1).normal(29, 3.9, 20)
    mixed = np.insert(values, [0, 5, 20, 20], [math.inf, math.nan, math.inf, math.nan])
    assert summarise(mixed) == summarise(values) | {"infinite": 2}


@pytest.mark.parametrize("values", [[], [math.inf], [math.nan, math.inf, math.nan]])
def test_a_summary_of_no_value_is_null_and_strict_json(values):
    summary = summarise(np.array(values, dtype=np.float64))
    assert [key for key, value in summary.items() if value is not None] == ["images", "infinite"]
    assert summary["images"] == 0
    json.dumps(summary, allow_nan=False)


def test_a_summary_of_one_value_has_no_spread():
    summary = summarise(np.array([28.5]))
    assert (summary["mean"], summary["std"], summary["low"]) == (28.5, None, None)
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("count", [RESAMPLED_UP_TO, 50_000])
def test_memory_is_bounded(count):
    values = np.random.default_rng(1).gamma(4, 1, count)
    tracemalloc.start()
    summarise(values)
    chance(values - 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8])
def test_a_chance_equals_scipys_permutation_test(shift):
    differences = np.random.default_rng(1).gamma(4, 0.5, 12) - 2 + shift
    exact = stats.permutation_test(
        (differences, np.zeros(12)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=10_000
    )
    assert chance(differences) == pytest.approx(exact.pvalue, abs=0.015)


def test_a_chance_of_many_differences_is_the_limit_of_the_signs(monkeypatch):
    differences = np.random.default_rng(1).normal(0.02, 1, RESAMPLED_UP_TO)
    counted = chance(differences)
    monkeypatch.setattr(statistics, "RESAMPLED_UP_TO", 0)
    assert chance(differences) == pytest.approx(counted, abs=0.015)


def test_chances_of_no_difference_are_even():
    generator = np.random.default_rng(1)
    chances = [chance(generator.laplace(0, 1, 15)) for _ in range(200)]
    assert stats.kstest(chances, "uniform").pvalue > 0.01


def test_no_difference_and_no_values_are_chance():
    assert chance(np.zeros(10)) == chance(np.zeros(0)) == 1.0
    assert 0 < chance(np.ones(100)) < 1e-3


def test_holms_correction_of_a_worked_example():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 never below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
