"""Latent channels, one by one."""

import torch

from vae.explore import ablate_channels, channel_maps


def test_a_channel_that_the_decoder_ignores_loses_nothing_and_others_do(kl, images):
    with torch.no_grad():
        kl.post_quant_conv.weight[:, 1] = 0.0  # pyright: ignore[reportIndexIssue]
    found = ablate_channels(kl, images)
    assert found.psnr_lost[:, 1].tolist() == [0.0, 0.0]
    assert torch.equal(found.ablated[:, 1], found.reconstructions)
    assert not torch.equal(found.ablated[:, 0], found.reconstructions)


def test_the_channel_alone_is_replaced_by_its_mean_over_the_image(autoencoder, images):
    found = ablate_channels(autoencoder, images)
    assert found.ablated.shape == (2, 3, 3, 24, 32)
    latents = found.latents.clone()
    latents[1, 2] = latents[1, 2].mean()
    with torch.no_grad():
        torch.testing.assert_close(found.ablated[1, 2], autoencoder.decode(latents)[1], atol=1e-5, rtol=0)


def test_maps_stretch_each_channel_between_its_own_percentiles():
    ramp = torch.linspace(0.0, 100.0, 101).view(1, 1, 101)
    maps, ranges = channel_maps(torch.cat([ramp, -3.0 * ramp, torch.full_like(ramp, 7.0)]), (2, 101))
    torch.testing.assert_close(ranges, torch.tensor([[1.0, 99.0], [-297.0, -3.0], [7.0, 7.0]]))
    assert maps.shape == (3, 1, 2, 101)
    assert maps[0, 0, 0, [0, 1, 50, 99, 100]].tolist() == [0, 0, 128, 255, 255]
    assert maps[2].max() == 0
