"""The audit against real half precision, and the rescaling against the function it must not change."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.presets import NETWORKS
from vae.evaluation.drop_in import latent_drift
from vae.models.autoencoder_kl import Attention, AutoencoderKL, ResnetBlock
from vae.models.fused import layer_by_layer
from vae.precision.audit import FLOAT16_MAX, HEADROOM, audit_precision, audit_steps, peaks_of, rounding
from vae.precision.rescale import factor_for, rescale


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.rand(1, 3, 32, 32) * 2 - 1 for _ in range(2)]


def overflowing(model: AutoencoderKL, stream: float = 2e4, inside: float = 3e3) -> AutoencoderKL:
    """The same function with a residual stream `stream` times as large and `conv1` outputs `inside` times.

    Written out by the roles of layers, and so independent of the repair, which goes by what the audit saw.
    """
    big = deepcopy(model)
    first = {big.encoder.conv_in, big.decoder.conv_in}
    in_stream = {module.conv for module in big.modules() if type(module).__name__ in ("Downsample", "Upsample")}
    with torch.no_grad():
        for name, module in big.named_modules():
            if isinstance(module, ResnetBlock):
                _times(module.conv1, inside, inside)
                _times(module.conv2, stream, stream)
            elif isinstance(module, Attention):
                _times(module.to_out[0], stream, stream)
            elif module in first:
                _times(module, stream, stream)
            elif module in in_stream or (name.endswith("conv_shortcut") and isinstance(module, nn.Conv2d)):
                _times(module, 1.0, stream)
    return big


def _times(layer: nn.Module, weight: float, bias: float) -> None:
    parameters = dict(layer.named_parameters())
    parameters["weight"].mul_(weight)
    parameters["bias"].mul_(bias)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4.0 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())
@torch.no_grad()
def test_a_network_that_overflows_float16_is_repaired_without_changing_its_function(perturbed, images, config):
    """Acceptance: float32 within 1e-4, real float16 finite and above 50 dB of float32."""
    broken = overflowing(perturbed(config))
    latents = broken.encode(images[0]).mode()
    exact = broken.decode(latents)
    assert not deepcopy(broken).half().decode(latents.half()).isfinite().all()
    audit = audit_precision(broken, images)
    assert audit.verdict.startswith("safe in float16: no, because the largest activation is")

    repaired = deepcopy(broken)
    changed = rescale(repaired, audit)
    assert changed
    assert all(factor in {2.0**-k for k in range(1, 40)} for factor in changed.values())
    torch.testing.assert_close(repaired.decode(latents), exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(repaired.encode(images[0]).mode(), latents, atol=1e-4, rtol=0)
    in_half = deepcopy(repaired).half().decode(latents.half()).float()
    assert in_half.isfinite().all()
    assert _psnr(in_half, exact) > 50.0
    after = audit_precision(repaired, images)
    assert after.is_safe
    assert after.headroom >= HEADROOM
    assert after.verdict.startswith("safe in float16: yes, because")


def test_a_safe_network_is_left_as_it_is_bit_for_bit(perturbed, images):
    model = perturbed(NETWORKS["sd-like"])
    before = deepcopy(model.state_dict())
    audit = audit_precision(model, images)
    assert audit.is_safe
    assert rescale(model, audit) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("peak", [0.0, 1.0, 16376.0, 16377.0, 65504.0, 1e6, 3.3e7])
def test_nothing_is_scaled_further_than_the_headroom_asks(peak):
    factor = factor_for(peak)
    assert factor == 1.0 or peak * 2 * factor * HEADROOM > FLOAT16_MAX
    assert peak * factor * HEADROOM <= FLOAT16_MAX
    assert math.frexp(factor)[0] == 0.5


@torch.no_grad()
def test_only_the_streams_that_need_it_are_scaled(perturbed, images):
    model = perturbed(NETWORKS["sd-like"])
    for layer in (model.decoder.up_blocks[2].resnets[0].conv2, model.decoder.up_blocks[2].resnets[1].conv2):
        _times(layer, 1e6, 1e6)
    changed = rescale(model, audit_precision(model, images))
    assert changed
    assert all(name.startswith("decoder.up_blocks.") for name in changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_rounding_every_layer_gives_what_the_real_format_gives(perturbed, images, dtype):
    model = perturbed(NETWORKS["sd-like"])
    before = deepcopy(model.state_dict())
    latents = model.encode(images[0]).mode()
    exact = model.decode(latents)
    with rounding(model, dtype):
        emulated = model.decode(latents)
    with layer_by_layer():  # as other programs compute
        real = deepcopy(model).to(dtype).decode(latents.to(dtype)).float()
    assert abs(_psnr(emulated, exact) - _psnr(real, exact)) < 2.0
    assert torch.equal(model.decode(latents), exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_peaks_are_the_largest_values_that_layers_put_out(perturbed, images):
    model = perturbed(NETWORKS["sd-like"])
    with peaks_of(model) as peaks:
        model.encode(images[0])
    first = model.encoder.conv_in(images[0])
    assert peaks["encoder.conv_in"] == first.abs().max().item()
    attention = model.encoder.mid_block.attentions[0]
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model.encode(images[0])
    tokens = attention.group_norm(seen[0]).flatten(2).transpose(1, 2)
    scores = attention.to_q(tokens) @ attention.to_k(tokens).transpose(1, 2)
    assert peaks["encoder.mid_block.attentions.0.scores"] == pytest.approx(scores.abs().max().item(), rel=1e-5)


def test_the_audit_says_beforehand_how_many_steps_it_takes(perturbed, images):
    steps: list[None] = []
    audit_precision(perturbed(NETWORKS["one level"]), images, lambda: steps.append(None))
    assert len(steps) == audit_steps(images)


def test_latents_have_not_drifted_while_the_encoder_is_the_same(perturbed, images):
    base = perturbed(NETWORKS["sd-like"])
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned.decoder.conv_out.weight.add_(1.0)
    drift = latent_drift(base, tuned, images)
    assert drift.changed == []
    assert drift.verdict == f"same latents: all {drift.encoder_tensors} encoder tensors are identical bit for bit"


def test_drifted_latents_are_measured_in_the_bases_spread(perturbed, images):
    base = perturbed(NETWORKS["sd-like"])
    tuned = deepcopy(base)
    assert isinstance(tuned.quant_conv, nn.Conv2d)
    assert tuned.quant_conv.bias is not None
    spread = torch.cat([base.encode(image).mean.transpose(0, 1).flatten(1) for image in images], dim=1).std()
    with torch.no_grad():
        tuned.quant_conv.bias[0] += 0.5 * spread
    drift = latent_drift(base, tuned, images)
    assert drift.changed == ["quant_conv.bias"]
    assert drift.shift == pytest.approx(0.5, rel=1e-3)
    assert drift.rms == pytest.approx(0.25, rel=1e-3)
    assert drift.verdict.startswith("latents have drifted: 1 of")
