"""Samples of posteriors, decoded."""

import pytest
import torch

from vae.errors import InputError
from vae.explore import vary


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_spread_every_sample_is_the_reconstruction_of_the_mean(autoencoder, images):
    found = vary(autoencoder, images, 3, spread=0.0)
    with torch.no_grad():
        expected = torch.cat([autoencoder.decode(autoencoder.encode(image[None]).mode()) for image in images])
    torch.testing.assert_close(found.reconstructions, expected, atol=1e-5, rtol=0)
    assert torch.equal(found.samples, found.reconstructions[:, None].expand(-1, 3, -1, -1, -1))
    assert found.psnr.isposinf().all()
    assert found.psnr.shape == (2, 3)


def test_the_same_seed_draws_the_same_bits_and_another_does_not(kl, images):
    one, again, other = (vary(kl, images, 2, generator=_seeded(seed)).samples for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_more_spread_is_further_from_the_mean(kl, images):
    near, far = (vary(kl, images, 4, spread, _seeded(0)) for spread in (1.0, 4.0))
    assert (near.psnr > far.psnr).all()
    assert near.pixel_std.shape == (2, 1, 24, 32)
    assert near.pixel_std.mean() < far.pixel_std.mean()


def test_the_widths_are_those_of_the_posterior(kl, images):
    found, posterior = vary(kl, images, 1), kl.encode(images)
    torch.testing.assert_close(found.posterior_std, posterior.std.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.latent_std, posterior.mean.std(dim=(1, 2, 3), correction=0))


def test_no_sample_and_a_negative_spread_are_refused(kl, images):
    with pytest.raises(InputError, match="count=0, expected 1 or more"):
        vary(kl, images, 0)
    with pytest.raises(InputError, match=r"spread=-1.0, expected 0 or more"):
        vary(kl, images, 1, spread=-1.0)
