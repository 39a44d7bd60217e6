"""The activation term: how far activations exceed a limit, as something to learn from."""

from dataclasses import replace

import pytest
import torch

from vae.config.model import AutoencoderConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.precision.audit import excess_of, peaks_of


@pytest.fixture
def model(perturbed, tiny: AutoencoderConfig) -> AutoencoderKL:
    return perturbed(replace(tiny, mid_block_add_attention=True))


def test_it_is_the_sum_over_layers_of_what_an_audit_finds_above_the_limit(model):
    images, limit = torch.rand(1, 3, 16, 16) * 2 - 1, 1.0
    with excess_of(model, limit) as excess:
        model.decode(model.encode(images).mode())
    with peaks_of(model) as peaks, torch.no_grad():
        model.decode(model.encode(images).mode())
    expected = sum(max(0.0, peak / limit - 1.0) for peak in peaks.values())
    assert excess.total is not None
    assert excess.total.item() == pytest.approx(expected, rel=1e-5)
    assert any(name.endswith(".scores") and peak > limit for name, peak in peaks.items())


def test_nothing_above_the_limit_is_zero_and_frozen_parts_do_not_count(model):
    images = torch.rand(1, 3, 16, 16)
    with excess_of(model, 1e6) as excess:
        model.encode(images)
    assert excess.total is not None
    assert excess.total.item() == 0
    with excess_of(model.requires_grad_(False), 1.0) as excess:
        model.encode(images)
    assert excess.total is None


def test_learning_from_it_brings_the_largest_activations_down(model):
    images, optimiser = torch.rand(2, 3, 16, 16), torch.optim.Adam(model.parameters(), 3e-3)
    totals = []
    for _ in range(60):
        with excess_of(model, 1.0) as excess:
            model.decode(model.encode(images).mode())
        assert excess.total is not None
        optimiser.zero_grad()
        excess.total.backward()
        optimiser.step()
        totals.append(excess.total.item())
    assert totals[-1] < 0.2 * totals[0]
