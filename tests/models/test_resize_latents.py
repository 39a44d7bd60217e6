"""More or fewer latent channels for a trained autoencoder."""

from dataclasses import replace

import pytest
import torch

from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.posterior import DiagonalGaussian
from vae.models.resize_latents import with_latent_channels

KINDS = pytest.mark.parametrize("quant", [True, False], ids=["quant convolutions", "none"])


def changed(model: AutoencoderKL, channels: int) -> AutoencoderKL:
    state, config = with_latent_channels(model.state_dict(), model.config, channels)
    other = AutoencoderKL(config).eval()
    other.load_state_dict(state)
    return other


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32) * 2 - 1


def build(perturbed, tiny: AutoencoderConfig, quant: bool) -> AutoencoderKL:
    return perturbed(replace(tiny, latent_channels=4, use_quant_conv=quant, use_post_quant_conv=quant))


@KINDS
@torch.no_grad()
def test_inflated_from_four_to_eight_it_reconstructs_as_before(perturbed, tiny, images, quant):
    before = build(perturbed, tiny, quant)
    after = changed(before, 8)
    old, new = before.encode(images), after.encode(images)
    torch.testing.assert_close(new.mean[:, :4], old.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(new.logvar[:, :4], old.logvar, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.decode(new.mode()), before.decode(old.mode()), atol=1e-5, rtol=0)
    noise = torch.randn(2, 8, 16, 16)
    sampled = after.decode(new.reparameterize(noise)), before.decode(old.reparameterize(noise[:, :4]))
    torch.testing.assert_close(*sampled, atol=1e-5, rtol=0)
    assert new.mean[:, 4:].std() > 0.01
    torch.testing.assert_close(new.logvar[:, 4:], torch.full_like(new.logvar[:, 4:], -6.0))


@KINDS
def test_the_new_channels_are_heard_after_an_update(perturbed, tiny, images, quant):
    model = changed(build(perturbed, tiny, quant), 8)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    gradients = []
    for _ in range(2):
        optimiser.zero_grad()
        (model.decode(model.encode(images).mode()) - images).abs().mean().backward()
        gradient = model.encoder.conv_out.weight.grad
        assert gradient is not None
        gradients.append(gradient[4:8].abs().max())
        optimiser.step()
    assert gradients[0] == 0
    assert gradients[1] > 0
    assert model.decoder.conv_in.weight[:, 4:].abs().max() > 0


@KINDS
@torch.no_grad()
def test_sliced_from_four_to_two_it_keeps_the_first_and_decodes_as_if_the_others_were_zero(
    perturbed, tiny, images, quant
):
    before = build(perturbed, tiny, quant)
    after = changed(before, 2)
    old, new = before.encode(images), after.encode(images)
    torch.testing.assert_close(new.mean, old.mean[:, :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(new.logvar, old.logvar[:, :2], atol=1e-5, rtol=0)
    missing = torch.cat([old.mean[:, :2], torch.zeros_like(old.mean[:, 2:])], dim=1)
    inside = (..., slice(1, -1), slice(1, -1))
    expected = before.decoder.conv_in(before.post_quant_conv(missing))[inside]
    found = after.decoder.conv_in(after.post_quant_conv(new.mean))[inside]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_statistics_of_the_old_channels_do_not_stay(perturbed, tiny):
    config = replace(tiny, latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    _, other = with_latent_channels(perturbed(config).state_dict(), config, 4)
    assert (other.latent_channels, other.latents_mean, other.latents_std) == (4, None, None)


def test_a_tiny_autoencoder_keeps_its_channels():
    config = AutoencoderConfig(
        architecture="tiny",
        block_out_channels=[8, 8],
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with pytest.raises(InputError, match="a KL autoencoder"):
        with_latent_channels({}, config, 8)


def test_a_posterior_of_more_channels_has_the_kl_of_the_old_ones_and_of_the_new(perturbed, tiny, images):
    before = build(perturbed, tiny, True)
    posterior = changed(before, 6).encode(images)
    new = DiagonalGaussian(posterior.mean[:, 4:], posterior.logvar[:, 4:])
    torch.testing.assert_close(posterior.kl(), before.encode(images).kl() + new.kl())
