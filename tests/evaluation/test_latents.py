"""Latent statistics against NumPy on all values at once, SciPy's cosine transform, and what white noise must give."""

import json

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from vae.evaluation.latents import BINS, LAGS, combine, describe, effective_rank, frequencies, radial_power
from vae.latents import LatentStatistics
from vae.models.posterior import DiagonalGaussian

SIZES = [(8, 8), (5, 12), (16, 4), (1, 9), (8, 8)]


@pytest.fixture
def posteriors() -> list[DiagonalGaussian]:
    """Four channels about 1000, 0, 3 and -2, correlated, of images of several sizes."""
    mixing = torch.randn(4, 4, dtype=torch.float64)
    offset = torch.tensor([1000.0, 0.0, 3.0, -2.0], dtype=torch.float64).view(1, 4, 1, 1)
    means = [torch.einsum("ij,bjhw->bihw", mixing, torch.randn(1, 4, h, w).double()) + offset for h, w in SIZES]
    return [DiagonalGaussian(mean, torch.randn_like(mean) - 2.0) for mean in means]


def _combined(posteriors: list[DiagonalGaussian]) -> dict:
    result = combine(describe(posterior) for posterior in posteriors)
    assert result is not None
    json.dumps(result, allow_nan=False)
    return result


def _noise(*shape: int, std: float = 1.0) -> DiagonalGaussian:
    mean = std * torch.randn(1, *shape, dtype=torch.float64)
    return DiagonalGaussian(mean, torch.full_like(mean, -30.0))


def test_moments_equal_those_of_latent_statistics(posteriors):
    expected = LatentStatistics(4)
    for posterior in posteriors:
        expected.update(posterior)
    result = _combined(posteriors)
    for name, value in expected.summary().items():
        assert result[name] == pytest.approx(value, rel=1e-10), name
    assert result["channel_is_active"] == expected.channel_is_active.tolist()
    assert result["clamped_share"] == expected.clamped_share
    assert result["kl"] == pytest.approx(expected.channel_kl.mean().item(), rel=1e-12)


def test_moments_are_those_of_samples(posteriors):
    """Noise is never drawn, and counts all the same."""
    mean = 2.0 * torch.randn(1, 4, 200, 200)
    posterior = DiagonalGaussian(mean, torch.full_like(mean, 1.0))
    result = _combined([posterior])
    assert result["std"] == pytest.approx(posterior.sample().std().item(), rel=1e-2)
    assert result["scaling_factor"] == 1.0 / result["std"]
    assert result["posterior_std"] == pytest.approx([np.exp(0.5)] * 4, rel=1e-6)


def test_channel_correlation_equals_numpys_on_all_values(posteriors):
    values = np.concatenate([p.mean[0].flatten(1).numpy() for p in posteriors], axis=1)
    result = _combined(posteriors)
    expected = np.corrcoef(values)
    np.testing.assert_allclose(np.array(result["correlation"]), expected, atol=1e-9)
    apart = np.abs(expected[np.triu_indices(4, 1)]).mean()
    assert result["mean_absolute_correlation"] == pytest.approx(apart, abs=1e-9)


def test_autocorrelation_equals_numpys_on_all_pairs(posteriors):
    result = _combined(posteriors)
    for lag in LAGS:
        each = []
        for channel in range(4):
            planes = [p.mean[0, channel].numpy() for p in posteriors]
            first = np.concatenate([part.ravel() for x in planes for part in (x[:-lag], x[:, :-lag])])
            second = np.concatenate([part.ravel() for x in planes for part in (x[lag:], x[:, lag:])])
            each.append(np.corrcoef(first, second)[0, 1])
        assert result["autocorrelation"][str(lag)] == pytest.approx(np.mean(each), abs=1e-8)


@pytest.mark.parametrize("size", [(16, 16), (7, 12), (1, 5), (2, 2)])
def test_the_spectrum_has_the_energies_of_scipys_cosine_transform(size):
    planes = np.random.default_rng(0).normal(size=(3, *size))
    energy = np.square(np.asarray(dctn(planes, axes=(1, 2), norm="ortho"))).sum(axis=0)
    rows, columns = np.meshgrid(*(np.arange(n) / (2 * n) for n in size), indexing="ij")
    radius = np.hypot(rows, columns)
    ours, count = radial_power(planes)
    for index, middle in enumerate(frequencies()):
        within = (np.abs(radius - middle) <= 0.5 * 0.5 / BINS) & (radius < middle + 0.5 * 0.5 / BINS) & (radius > 0)
        assert count[index] == 3 * within.sum()
        assert ours[index] == pytest.approx(energy[within].sum(), rel=1e-10, abs=1e-12)


def test_white_noise_is_flat_uncorrelated_and_of_full_rank():
    result = _combined([_noise(4, size, size, std=2.0) for size in (32, 64, 48)])
    assert result["spectrum"]["power"] == pytest.approx([4.0] * BINS, rel=0.25)
    assert result["spectrum"]["high_to_low"] == pytest.approx(1.0, abs=0.1)
    assert result["autocorrelation"] == pytest.approx({"1": 0.0, "2": 0.0, "4": 0.0}, abs=0.03)
    assert result["effective_rank"] == pytest.approx(4.0, abs=0.01)
    assert result["mean_absolute_correlation"] < 0.03


def test_means_of_two_by_two_neighbours_are_half_correlated_at_lag_one_only():
    smooth = [torch.nn.functional.avg_pool2d(_noise(4, 129, 129).mean, 2, stride=1) for _ in range(2)]
    result = _combined([DiagonalGaussian(mean, torch.full_like(mean, -30.0)) for mean in smooth])
    assert result["autocorrelation"] == pytest.approx({"1": 0.5, "2": 0.0, "4": 0.0}, abs=0.03)
    assert result["spectrum"]["high_to_low"] < 0.5


def test_copies_of_a_channel_add_no_rank():
    plane = torch.randn(1, 1, 16, 16)
    assert _combined([DiagonalGaussian(plane.expand(-1, 6, -1, -1), plane.expand(-1, 6, -1, -1) - 9)])[
        "effective_rank"
    ] == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(np.diag([1.0, 1.0, 0.0])) == pytest.approx(2.0)


def _channels(*pairs: tuple[Tensor, Tensor]) -> DiagonalGaussian:
    return DiagonalGaussian(*(torch.stack(parts)[None] for parts in zip(*pairs, strict=True)))


def test_what_ails_a_channel_is_said_in_words():
    values, zero = torch.randn(64, 64), torch.zeros(64, 64)
    healthy = values, zero - 6
    result = _combined(
        [_channels(healthy, (zero, zero), (0.3 * values, zero - 0.1), (0.05 * values, zero - 8), healthy)]
    )
    assert result["channel_is_active"] == [True, False, True, False, True]
    assert result["warnings"] == [
        "channel 1 is collapsed: below 0.01 nats per element, the decoder learns nothing from it",
        "channel 2 is nearly all noise: the posterior's own spread is over 90% of the channel's",
        "channel 3 is hardly used: the variance of its means over the images is not above 0.01",
    ]
    assert _combined([_channels(healthy, healthy)])["warnings"] == []
    several = _combined([_channels(healthy, *[(zero, zero)] * 3)])["warnings"]
    assert several[0].startswith("each of channels 1, 2 and 3 is collapsed")
    assert _combined([_channels(*[(zero, zero)] * 3)])["warnings"][0].startswith("each of the 3 channels is collapsed")
    assert _combined([_channels((values, zero - 40))])["warnings"] == [
        "100% of log-variances are at the bounds -30 and 20"
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (1, 1, 8), (4, 2, 2)])
def test_the_smallest_latents_give_numbers_or_null(shape):
    result = _combined([_noise(*shape)])
    assert result["values_per_channel"] == shape[1] * shape[2]
    assert len(result["spectrum"]["power"]) == BINS


def test_constant_latents_have_no_scale():
    constant = torch.full((1, 2, 4, 4), 0.5)
    sums = describe(DiagonalGaussian(constant, constant - 30))
    result = combine([sums | {"noise": np.zeros(2)}])
    assert result is not None
    assert result["scaling_factor"] is None
    assert result["effective_rank"] is None
    assert result["correlation"] == [[None, None], [None, None]]
    assert result["autocorrelation"] == {"1": None, "2": None, "4": None}
    assert "all latents are the same number: there is no scaling factor" in result["warnings"]


def test_an_image_that_is_not_finite_changes_nothing_and_is_counted(posteriors):
    broken = DiagonalGaussian(torch.full((1, 4, 8, 8), torch.nan), torch.zeros(1, 4, 8, 8))
    result = _combined([posteriors[0], broken, *posteriors[1:]])
    assert result == _combined(posteriors) | {"not_finite": 1}
    assert combine([describe(broken)]) is None
    assert combine([]) is None


def test_sums_are_float64_and_small(posteriors):
    sums = describe(posteriors[0])
    assert all(values.dtype == np.float64 for values in sums.values())
    assert sum(values.size for values in sums.values()) == 4**2 + 21 * 4 + 37
