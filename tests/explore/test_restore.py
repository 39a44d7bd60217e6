"""Damage, and what is measured of its repair."""

import pytest
import torch

from vae.data.transforms import to_uint8
from vae.errors import InputError
from vae.explore import add_noise, mask_blocks, restore
from vae.metrics.pixel import psnr
from vae.metrics.ssim import ssim


def test_noise_has_the_standard_deviation_that_is_asked_for():
    grey = torch.zeros(1, 3, 128, 128)
    noisy = add_noise(grey, 0.1, torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    assert add_noise(grey, 100.0).abs().max() == 1.0


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (256, 160)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_that_is_masked_is_the_one_asked_for(size, share):
    masked = mask_blocks(torch.ones(2, 3, *size), share)
    assert (masked == 0).float().mean(dim=(1, 2, 3)).tolist() == [share, share]


def test_blocks_of_sides_that_16_does_not_divide_are_nearly_alike():
    masked = mask_blocks(torch.ones(1, 1, 250, 100), 0.25)
    assert (masked == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_same_seed_damages_the_same_pixels(images):
    for damage in (add_noise, mask_blocks):
        one, again = (damage(images, 0.3, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, again)
        assert not torch.equal(one, images)


def test_gains_are_the_differences_of_the_metrics(autoencoder, images):
    damaged = add_noise(images, 0.2)
    found = restore(autoencoder, images, damaged)
    with torch.no_grad():
        after = torch.cat([autoencoder.decode(autoencoder.encode(image[None]).mode()) for image in damaged])
    torch.testing.assert_close(found.restored, after, atol=1e-5, rtol=0)
    clean, before, after = (to_uint8(one) for one in (images, damaged, found.restored))
    assert torch.equal(found.psnr_gain, psnr(clean, after) - psnr(clean, before))
    assert torch.equal(found.ssim_gain, ssim(clean, after) - ssim(clean, before))


def test_damage_that_cannot_be_is_refused(images):
    with pytest.raises(InputError, match=r"share=1.5, expected 0 to 1"):
        mask_blocks(images, 1.5)
    with pytest.raises(InputError, match=r"std=-0.1, expected 0 or more"):
        add_noise(images, -0.1)
