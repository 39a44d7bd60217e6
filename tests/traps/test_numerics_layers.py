"""Rows N10, N11, N12 and N17 of the table of traps: attention in float16, the layers of the released weights,
checkpointing, initialisation. Each claim is shown to be false once the peers' defect is put in place of our code."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vae.config.loss import DiscriminatorConfig
from vae.config.model import AutoencoderConfig
from vae.losses.adversarial import hinge_discriminator_loss
from vae.models.autoencoder_kl import Attention, AutoencoderKL, Downsample, Encoder, Upsample
from vae.models.discriminator import PatchDiscriminator
from vae.weights.formats import to_diffusers_config

FLOAT16_MAX = 65504.0


def images_of(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


@torch.no_grad()
def attention_survives_float16() -> None:
    """Products of queries and keys above float16's largest number, and within it once they are scaled."""
    attention, x = Attention(64, groups=4), torch.randn(1, 64, 3, 3)
    for projection in (attention.to_q, attention.to_k):
        projection.weight.copy_(40.0 * torch.eye(64))
        projection.bias.zero_()
    tokens = 40.0 * attention.group_norm(x).flatten(2).transpose(1, 2)
    largest = (tokens @ tokens.mT).max()
    assert largest / 8 < FLOAT16_MAX < largest
    expected = attention(x)
    attention.half()
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            torch.testing.assert_close(attention(x.half()).float(), expected, atol=1e-2, rtol=0)


def _scaled_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """latent-diffusion's AttnBlock."""
    return torch.softmax(torch.matmul(q, k.mT) * q.shape[-1] ** -0.5, dim=-1) @ v


def test_attention_in_float16_does_not_overflow_before_it_scales(monkeypatch):
    """N10: the mutant holds unscaled scores in float16, as latent-diffusion does."""
    attention_survives_float16()
    monkeypatch.setattr(F, "scaled_dot_product_attention", _scaled_after_the_product)
    with pytest.raises(AssertionError):
        attention_survives_float16()


@torch.no_grad()
def latents_and_images_are_diffusers(config: AutoencoderConfig, contrast: float) -> None:
    """`contrast` near nothing brings the variances down to where a norm's epsilon shows."""
    ours = AutoencoderKL(config).eval()
    ours.encoder.conv_in.weight.mul_(contrast)
    ours.encoder.conv_in.bias.mul_(contrast)  # pyright: ignore[reportOptionalMemberAccess]
    theirs = cast(Any, Authority.from_config(to_diffusers_config(config))).eval()  # untyped upstream
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, latents = images_of(1, 16, 24), torch.randn(1, config.latent_channels, 8, 12)
    torch.testing.assert_close(ours.encode(images).mean, theirs.encode(images).latent_dist.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-5, rtol=0)


def _padded_on_all_sides(self: Downsample, x: Tensor) -> Tensor:
    return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


def _interpolated_linearly(self: Upsample, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


LAYERS = {
    "symmetric padding": lambda patch: patch.setattr(Downsample, "forward", _padded_on_all_sides),
    "epsilon of 1e-5": lambda patch: patch.setattr("vae.models.autoencoder_kl.NORM_EPS", 1e-5),
    "bilinear upsampling": lambda patch: patch.setattr(Upsample, "forward", _interpolated_linearly),
}


@pytest.mark.parametrize("mutate", LAYERS.values(), ids=LAYERS.keys())
def test_padding_epsilon_and_upsampling_are_those_of_the_released_weights(monkeypatch, tiny, mutate):
    """N11: none of them changes a shape or a name, all of them change what released weights compute."""
    for contrast in (1.0, 1e-2):
        latents_and_images_are_diffusers(tiny, contrast)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        latents_and_images_are_diffusers(tiny, contrast=1e-2)


def checkpointing_changes_nothing(model: AutoencoderKL) -> None:
    images, seen = images_of(1, 16, 16), []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        reconstructions, posterior = model(images, torch.Generator().manual_seed(0))
        (reconstructions.square().mean() + posterior.kl().mean()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        seen.append([reconstructions.detach(), posterior.mean.detach(), *(g.clone() for g in gradients)])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*seen, strict=True))


def test_gradient_checkpointing_sees_the_same_images(monkeypatch, tiny):
    """N12: in diffusers' EncoderTiny the branch that checkpoints leaves out the change of range."""
    checkpointing_changes_nothing(AutoencoderKL(tiny))
    forward = Encoder.forward
    monkeypatch.setattr(
        Encoder,
        "forward",
        lambda self, images: forward(self, images if self.gradient_checkpointing else images.add(1).div(2)),
    )
    with pytest.raises(AssertionError):
        checkpointing_changes_nothing(AutoencoderKL(tiny))


@torch.no_grad()
def a_new_autoencoder_neither_explodes_nor_is_mute() -> None:
    """Images from unit latents have a fraction of an image's spread, and latents more signal than noise."""
    for widths in ([32, 64], [64, 64, 128, 128]):
        model = AutoencoderKL(AutoencoderConfig(block_out_channels=widths, layers_per_block=1))
        decoded = model.decode(torch.randn(2, 4, 8, 8))
        assert 0.1 < decoded.std() < 1.0
        assert decoded.mean().abs() < 0.5
        posterior = model.encode(images_of(2, 64, 64))
        assert posterior.mean.std() > 2 * posterior.std.mean()


def _like_a_resnet(self: AutoencoderKL) -> None:
    for module in self.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _with_a_last_layer_of_zeros(self: AutoencoderKL) -> None:
    nn.init.zeros_(self.decoder.conv_out.weight)
    nn.init.zeros_(cast(Tensor, self.decoder.conv_out.bias))


def _with_quant_convolutions_of_zeros(self: AutoencoderKL) -> None:
    """mosaicml/diffusion: every posterior N(0, 1), so that the decoder learns from noise alone."""
    for parameter in self.quant_conv.parameters():
        nn.init.zeros_(parameter)


def _as_it_comes(self: AutoencoderKL) -> None:
    """PyTorch's default: a standard deviation of about 1 for means of a fifth."""


@pytest.mark.parametrize(
    "initialise",
    [_like_a_resnet, _with_a_last_layer_of_zeros, _with_quant_convolutions_of_zeros, _as_it_comes],
)
def test_a_new_autoencoder_decodes_to_a_sane_variance_and_hears_its_encoder(monkeypatch, initialise):
    """N17. The mutants run where our constructor narrows the posterior."""
    a_new_autoencoder_neither_explodes_nor_is_mute()
    monkeypatch.setattr(AutoencoderKL, "_narrow_posterior", initialise)
    with pytest.raises(AssertionError):
        a_new_autoencoder_neither_explodes_nor_is_mute()


def new_discriminators() -> list[PatchDiscriminator]:
    return [PatchDiscriminator(DiscriminatorConfig(norm=norm)) for norm in ("group", "none", "batch")]


def the_weights_are_pix2pixs() -> None:
    for discriminator in new_discriminators():
        for layer in discriminator.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert layer.weight.mean().abs() < 0.002
                assert layer.bias is None or not layer.bias.any()


@torch.no_grad()
def neither_side_of_the_hinge_has_won() -> None:
    """Logits are near 0 without a norm, and about 1 wide behind one, LDM's BatchNorm or our GroupNorm."""
    for discriminator in new_discriminators():
        logits = discriminator(images_of(2, 64, 64))
        has_norm = any(isinstance(layer, nn.GroupNorm | nn.BatchNorm2d) for layer in discriminator.modules())
        assert has_norm or logits.abs().max() < 0.25
        assert 0.9 < hinge_discriminator_loss(logits[:1], logits[1:]) < 2.0


def _as_pytorch_does_it(_: nn.Module) -> None:
    """Uniform by the fan-in, biases too."""


def _ten_times_wider(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.2)


@pytest.mark.parametrize(
    ("claim", "initialise"),
    [(the_weights_are_pix2pixs, _as_pytorch_does_it), (neither_side_of_the_hinge_has_won, _ten_times_wider)],
)
def test_a_new_discriminator_has_pix2pixs_weights_and_is_undecided(monkeypatch, claim, initialise):
    """N17: normal weights of 0.02 and zero biases; the mutants are PyTorch's default, and too wide a spread."""
    claim()
    monkeypatch.setattr("vae.models.discriminator._initialise", initialise)
    with pytest.raises(AssertionError):
        claim()
