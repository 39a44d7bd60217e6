"""AutoencoderTiny beside diffusers', and its pooling blocks beside a few lines of torch."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Authority

from tests.presets import TINY, TINY_PRESETS, preset
from vae.config.model import ARCHITECTURES, AutoencoderConfig
from vae.errors import InputError
from vae.latents import LatentStatistics
from vae.models.autoencoder_tiny import AutoencoderTiny, TinyBlock
from vae.models.base import Autoencoder, build_autoencoder, network_of
from vae.models.strips import decode_in_strips, encode_in_strips
from vae.precision.audit import audit_precision, peaks_of
from vae.weights.formats import format_of, to_diffusers_config

IMAGES = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_and_images_are_those_of_diffusers(channels):
    config = TINY(latent_channels=channels)
    theirs = cast(Any, Authority.from_config(to_diffusers_config(config))).eval()  # untyped upstream
    ours = AutoencoderTiny(config)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        latents = theirs.encode(IMAGES).latents
        torch.testing.assert_close(ours.encode(IMAGES).mode(), latents, atol=1e-5, rtol=0)
        far = 4 * latents + torch.randn_like(latents)
        torch.testing.assert_close(ours.decode(far), theirs.decode(far).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_the_presets_have_as_many_weights_as_the_published_files(name):
    with torch.device("meta"):
        model = build_autoencoder(preset(name))
    sizes = {"taesd": (134, 2_445_063), "taesd3": (134, 2_458_899), "taef2": (158, 2_677_027)}
    weights = model.state_dict().values()
    assert (len(weights), sum(weight.numel() for weight in weights)) == sizes[name]
    pooled = {half: [i for i, layer in enumerate(getattr(model, half).layers) if has_pool(layer)] for half in HALVES}
    expected = {"encoder": [11, 12, 13], "decoder": [2, 3, 4]}
    assert pooled == (expected if name == "taef2" else {"encoder": [], "decoder": []})


HALVES = ("encoder", "decoder")


def has_pool(layer: torch.nn.Module) -> bool:
    return isinstance(layer, TinyBlock) and layer.pool is not None


def test_a_block_that_pools_is_what_taef2_says():
    block = TinyBlock(8, pool=True).requires_grad_(False)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    weights, x = block.state_dict(), torch.rand(2, 8, 6, 6)
    groups = F.conv2d(x, weights["pool.0.weight"])
    groups = F.group_norm(groups, 4, weights["pool.1.weight"], weights["pool.1.bias"])
    x1 = x + F.conv2d(groups.relu(), weights["pool.3.weight"])
    inner = x1
    for number in (0, 2, 4):
        inner = inner.relu() if number else inner
        inner = F.conv2d(inner, weights[f"conv.{number}.weight"], weights[f"conv.{number}.bias"], padding=1)
    torch.testing.assert_close(block(x), (inner + x1).relu())


def test_a_posterior_has_no_width_and_counts_as_none():
    posterior = AutoencoderTiny(TINY()).encode(IMAGES)
    torch.testing.assert_close(posterior.sample(), posterior.mode(), atol=3e-6, rtol=0)
    statistics = LatentStatistics(4)
    statistics.update(posterior)
    assert not statistics.has_width
    assert "kl_per_channel" not in statistics.summary()


@pytest.mark.parametrize("pool", [False, True])
def test_gradient_checkpointing_changes_no_gradient(pool):
    model = AutoencoderTiny(TINY(mid_block_pool=pool))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        model.set_gradient_checkpointing(enabled)
        reconstructions, _ = model(IMAGES, torch.Generator().manual_seed(1))
        (reconstructions - IMAGES).square().mean().backward()
        gradients.append([cast(torch.Tensor, parameter.grad) for parameter in model.parameters()])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_half_precision_weights_take_float32_latents():
    model = AutoencoderTiny(TINY()).to(torch.bfloat16)
    posterior = model.encode(IMAGES.bfloat16())
    assert posterior.mean.dtype == torch.float32
    assert model.decode(posterior.mode()).dtype == torch.bfloat16


def test_the_audit_sees_every_convolution_and_block():
    model = AutoencoderTiny(TINY(mid_block_pool=True)).eval()
    with torch.no_grad(), peaks_of(model) as peaks:
        model.decode(model.encode(IMAGES).mode())
    kinds = (torch.nn.Conv2d, torch.nn.GroupNorm, TinyBlock)
    assert set(peaks) == {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert audit_precision(model, [IMAGES]).is_safe


def test_what_only_a_kl_autoencoder_can_do_is_refused():
    model = AutoencoderTiny(TINY())
    with pytest.raises(InputError, match=r"strips \(--memory\) with a tiny autoencoder, expected none"):
        decode_in_strips(model, torch.zeros(1, 4, 4, 4))
    with pytest.raises(InputError, match=r"strips \(--memory\) with a tiny autoencoder"):
        encode_in_strips(model, IMAGES)
    with pytest.raises(InputError, match="images are 30x32 pixels, expected multiples of 8"):
        model.encode(torch.zeros(1, 3, 32, 30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "small"}, r"model.architecture='small', expected one of \['kl', 'tiny'\]"),
        ({"mid_block_pool": True}, "model.mid_block_pool=True with model.architecture=kl, expected False"),
        ({"architecture": "tiny"}, "model.use_quant_conv=True with model.architecture=tiny, expected False"),
    ],
)
def test_a_configuration_that_cannot_take_effect_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        AutoencoderConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_levels": [1]}, r"model.attention_levels=\[1\] with model.architecture=tiny, expected \[\]"),
        ({"mid_block_add_attention": True}, "model.mid_block_add_attention=True with model.architecture=tiny"),
        ({"block_out_channels": [64, 32]}, r"expected one width at all levels, as \[64, 64\]"),
        ({"block_out_channels": [0]}, "expected 1 to 12 widths, each at most"),
    ],
)
def test_what_a_tiny_autoencoder_does_not_have_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TINY(**fields)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_that_can_be_named_has_a_network_and_published_files(name):
    config = TINY() if name == "tiny" else AutoencoderConfig(architecture=name)
    assert issubclass(network_of(config), Autoencoder)
    assert format_of(name).architecture == name
