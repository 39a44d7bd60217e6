"""Images from latents that no image has."""

import pytest
import torch

from vae.data.transforms import to_uint8
from vae.errors import InputError
from vae.explore import sample_positions, sample_prior, survey
from vae.latents import LatentStatistics, measure_latents
from vae.metrics.pixel import psnr
from vae.models.posterior import DiagonalGaussian


@pytest.fixture
def latents_of(monkeypatch, kl):
    """The model with a decoder that gives back the latents."""
    monkeypatch.setattr(kl, "decode", lambda latents: latents)
    return kl


def test_samples_have_the_size_that_is_asked_for_and_the_bits_of_their_seed(autoencoder):
    one, again = (sample_prior(autoencoder, (24, 16), 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == (2, 3, 24, 16)
    assert torch.equal(one, again)


def test_latents_are_standard_normal_or_have_the_mean_and_spread_of_each_channel(latents_of):
    centre, spread = torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([0.1, 1.0, 2.0])
    statistics = LatentStatistics(3)
    values = centre[:, None, None] + spread[:, None, None] * torch.randn(8, 3, 64, 64)
    statistics.update(DiagonalGaussian(values, torch.full_like(values, -30.0)))
    for given, mean, std in ((None, torch.zeros(3), torch.ones(3)), (statistics, centre, spread)):
        latents = sample_prior(latents_of, (128, 128), 8, given)
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), std, atol=0, rtol=0.05)


def test_a_size_that_the_model_cannot_make_is_refused(kl):
    with pytest.raises(InputError, match=r"size=\(24, 15\), expected height and width in multiples of 2"):
        sample_prior(kl, (24, 15), 1)


def test_latents_of_random_positions_are_whole_vectors_of_the_given_ones(latents_of):
    given = torch.arange(2 * 4 * 5.0).view(2, 1, 4, 5) + torch.tensor([0.0, 100.0, 200.0])[:, None, None]
    drawn = sample_positions(latents_of, given, 6)
    assert drawn.shape == (6, 3, 4, 5)
    assert torch.equal(drawn[:, 1], drawn[:, 0] + 100)
    assert torch.equal(drawn[:, 2], drawn[:, 0] + 200)
    assert set(drawn[:, 0].flatten().tolist()) <= set(range(40))
    assert drawn[:, 0].unique().numel() > 20


def test_a_survey_measures_all_images_and_keeps_the_first(kl, images):
    found = survey(kl, [*images, images[0].flip(2)], 2)
    everything = torch.cat([images, images[:1].flip(3)])
    expected = measure_latents(kl, [everything])
    torch.testing.assert_close(found.statistics.channel_std, expected.channel_std)
    with torch.no_grad():
        posterior = kl.encode(everything)
        reconstructions = kl.decode(posterior.mode())
    assert found.posterior_std == pytest.approx(posterior.std.mean().item(), rel=1e-5)
    assert found.psnr == pytest.approx(psnr(to_uint8(everything), to_uint8(reconstructions)).mean().item(), abs=0.01)
    assert torch.equal(found.images, images)
    torch.testing.assert_close(found.mean, posterior.mean[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reconstructions, reconstructions[:2], atol=1e-5, rtol=1e-5)
