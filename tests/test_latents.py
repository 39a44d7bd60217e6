import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

from tests.presets import TINY
from vae.config.model import Assumed, AutoencoderConfig
from vae.latents import LatentStatistics, latents_for, scale_latents, unscale_latents
from vae.models.posterior import DiagonalGaussian


@pytest.mark.parametrize("shift", [None, 0.0609])
def test_scaling_then_unscaling_is_the_identity(shift):
    config = AutoencoderConfig(scaling_factor=1.5305, shift_factor=shift)
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(unscale_latents(scale_latents(latents, config), config), latents)


def test_the_shift_comes_before_the_scale():
    config = AutoencoderConfig(scaling_factor=2.0, shift_factor=1.0)
    assert scale_latents(torch.tensor(3.0), config) == 4.0


def test_latents_with_a_mean_and_std_per_channel_are_scaled_as_diffusers_sdxl_pipelines_do():
    config = AutoencoderConfig(
        scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0], shift_factor=9.0
    )
    latents = torch.randn(2, 4, 8, 8)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
    scaled = scale_latents(latents, config)
    torch.testing.assert_close(scaled, (latents - mean) * 0.5 / std)
    torch.testing.assert_close(scaled * std / 0.5 + mean, latents)
    torch.testing.assert_close(unscale_latents(scaled, config), latents)


@pytest.mark.parametrize("split", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 2], [1, 1, 1, 1, 1]])
def test_statistics_equal_the_two_pass_ones_however_the_images_are_split(split):
    """100,000 values about 1000 in 1 to 5 shards."""
    mean = 1000 + torch.randn(5, 4, 50, 100, dtype=torch.float64)
    noise_free = torch.full_like(mean, -30.0)
    statistics = LatentStatistics(4)
    for means, logvars in zip(mean.split(split), noise_free.split(split), strict=True):
        share = LatentStatistics(4)
        share.update(DiagonalGaussian(means, logvars))
        statistics.merge(share)
    torch.testing.assert_close(statistics.channel_std, mean.transpose(0, 1).flatten(1).std(dim=1, correction=0))
    torch.testing.assert_close(statistics.channel_mean, mean.mean(dim=(0, 2, 3)))
    assert statistics.std == pytest.approx(mean.std(correction=0).item(), rel=1e-9)
    assert statistics.mean == pytest.approx(mean.mean().item(), rel=1e-12)
    assert statistics.scaling_factor == pytest.approx(1 / mean.std(correction=0).item(), rel=1e-9)


def test_the_spread_of_the_posterior_counts():
    posterior = DiagonalGaussian(torch.randn(8, 4, 64, 64) * 2.0, torch.full((8, 4, 64, 64), 1.0))
    statistics = LatentStatistics(4)
    statistics.update(posterior)
    assert statistics.std == pytest.approx(posterior.sample().std().item(), rel=1e-2)
    assert statistics.scaling_factor == pytest.approx(1 / statistics.std)


def test_latents_between_a_kl_and_a_tiny_autoencoder_are_those_a_diffusion_model_sees(tiny):
    kl, small, latents = replace(tiny, scaling_factor=0.5, shift_factor=0.25), TINY(), torch.randn(2, 3, 4, 4)
    there = latents_for(small, latents, kl)
    assert torch.equal(there, scale_latents(latents, kl))
    torch.testing.assert_close(latents_for(kl, there, small), latents)
    assert latents_for(replace(kl, scaling_factor=2.0), latents, kl) is latents


def test_a_new_scale_leaves_nothing_of_the_old_one():
    before = AutoencoderConfig(scaling_factor=0.5, shift_factor=1.0, latents_mean=[1.0] * 4, latents_std=[8.0] * 4)
    assert before.with_scale(0.125) == AutoencoderConfig(scaling_factor=0.125)
    assert before.with_scale(1.0, latents_mean=[0.0] * 4, latents_std=[2.0] * 4).shift_factor is None


def test_an_assumed_scale_stays_assumed_until_another_is_put_there_and_its_use_is_said():
    assumed = AutoencoderConfig(scaling_factor=Assumed(0.18215))
    for same in (replace(assumed, sample_size=64), copy.deepcopy(assumed), AutoencoderConfig(**asdict(assumed))):
        assert not same.scale_is_known
    assert (json.dumps(asdict(assumed)), assumed) == (json.dumps(asdict(AutoencoderConfig())), AutoencoderConfig())
    for told in (replace(assumed, scaling_factor=0.13025), assumed.with_scale(0.18215), assumed.taking_its_scale()):
        assert told.scale_is_known
    latents = torch.randn(1, 4, 2, 2)
    for use in (scale_latents, unscale_latents):
        with pytest.warns(UserWarning, match=r"scaling factor 0\.18215 is assumed, .* vae convert --family once"):
            use(latents, assumed)
    assert torch.equal(scale_latents(latents, assumed.taking_its_scale()), latents * 0.18215)
