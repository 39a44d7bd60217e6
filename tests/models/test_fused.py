"""The layers as they are computed against the same layers as they are written: outputs, gradients, memory."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.presets import NETWORKS
from vae.config.model import AutoencoderConfig
from vae.models import fused
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.fused import aten, layer_by_layer, nearest_conv, norm_silu_conv, pad_conv, transposed_kernel

MOST = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative error


def _learned(model: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    """Reconstructions, the posterior's moments and all gradients, the images' too."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    reconstructions, posterior = model(images, torch.Generator().manual_seed(0))
    ((reconstructions - images).tanh().square().mean() + 1e-3 * posterior.kl().mean()).backward()
    found = {"reconstructions": reconstructions, "mean": posterior.mean, "logvar": posterior.logvar}
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: value.detach().clone()
        for name, value in (found | named | {"images": images.grad}).items()
        if value is not None
    }


def _errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative ones; of a gradient that is zero but for rounding, as a key's bias has it, relative to the largest."""
    assert found.keys() == wanted.keys()
    least = 1e-4 * max(value.norm().item() for value in wanted.values())
    return {key: ((found[key] - wanted[key]).norm() / wanted[key].norm().clamp_min(least)).item() for key in wanted}


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_all_gradients_are_those_of_the_layers_as_written(name, dtype, perturbed):
    model = perturbed(NETWORKS[name]).to(dtype)
    images = torch.rand(2, 3, 24, 40, dtype=dtype) * 2 - 1
    fast = _learned(model, images)
    with layer_by_layer():
        plain = _learned(model, images)
    errors = _errors(fast, plain)
    assert max(errors.values()) < MOST[dtype], max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_under_autocast_gradients_are_as_near_to_those_in_float32_as_layer_by_layer(memory_format, perturbed):
    model = perturbed(NETWORKS["sd-like"]).to(memory_format=memory_format)
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).contiguous(memory_format=memory_format)
    exact = _learned(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        fast = _learned(model, images)
        with layer_by_layer():
            plain = _learned(model, images)
    assert {value.dtype for key, value in fast.items() if key in dict(model.named_parameters())} == {torch.float32}
    ours, theirs = (fmean(_errors(found, exact).values()) for found in (fast, plain))
    assert ours < 1.5 * theirs  # of the same size: 0.7 to 1.2, by weights and by the CPU's instructions
    assert ours < 0.1


@pytest.mark.parametrize("frozen", ["encoder", "decoder", "decoder.up_blocks.0", "decoder.mid_block.resnets.0.norm1"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, perturbed):
    model = perturbed(NETWORKS["sd-like"])
    images = torch.rand(1, 3, 16, 16)
    before = _learned(model, images)
    model.get_submodule(frozen).requires_grad_(False)
    model.zero_grad()
    after = _learned(model, images)
    assert before.keys() - after.keys() == {
        f"{frozen}.{name}" for name, _ in model.get_submodule(frozen).named_parameters()
    }
    for name, value in after.items():
        torch.testing.assert_close(value, before[name])


def test_less_than_half_of_the_activations_is_kept_for_backward(perturbed):
    model, images = perturbed(NETWORKS["sd-like"]), torch.rand(1, 3, 64, 64)
    fast = _kept(lambda: model(images))
    with layer_by_layer():
        plain = _kept(lambda: model(images))
    assert fast < 0.5 * plain


def _kept(call: Callable[[], object]) -> int:
    """Bytes of the distinct tensors that autograd keeps."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = call()
    assert alive
    return sum(kept.values())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (5, 4), (8, 3)])
def test_a_transposed_convolution_is_nearest_neighbour_and_a_convolution(height, width):
    conv, x = nn.Conv2d(3, 5, 3, padding=1).double(), torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(nearest_conv(conv, x), expected, rtol=0, atol=1e-12)
    assert transposed_kernel(conv.weight).shape == (3, 5, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 6), (8, 4)])
def test_downsampling_pads_below_and_to_the_right_only(height, width):
    conv, x = nn.Conv2d(3, 5, 3, stride=2).double(), torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(pad_conv(conv, x), conv(F.pad(x, (0, 1, 0, 1))), rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused_and_taken_layer_by_layer():
    """Also where the loss has another term, beside which a missing one would not be seen."""
    norm, conv, x = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer_by_layer"):
        torch.autograd.grad(norm_silu_conv(norm, conv, x).sum(), x, create_graph=True)
    with layer_by_layer():
        (first,) = torch.autograd.grad(norm_silu_conv(norm, conv, x).sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_group_norm_get_what_is_contiguous(name, layout, perturbed, monkeypatch):
    """In some releases they read past the end of anything else."""
    model, images = perturbed(NETWORKS[name]).to(memory_format=layout), torch.rand(1, 3, 24, 40)
    seen: list[bool] = []

    def looking(kernel: Callable[..., Any], tensors: int) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            seen.extend(one.is_contiguous() for one in given[:tensors])
            return kernel(*given)

        return called

    kernels = {name: getattr(aten, name) for name in ("convolution_backward", "silu_backward")}
    backward = looking(aten.native_group_norm_backward, 2)
    monkeypatch.setattr(torch, "native_group_norm", looking(torch.native_group_norm, 1))
    monkeypatch.setattr(fused, "aten", SimpleNamespace(native_group_norm_backward=backward, **kernels))
    _learned(model, images.contiguous(memory_format=layout))
    assert len(seen) > 20
    assert all(seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_the_error_does_not_grow_with_the_image(layout, perturbed):
    """PyTorch's group norm with channels last sums in float32, pixel after pixel."""
    config = AutoencoderConfig(
        block_out_channels=[8], layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    model = perturbed(config)
    model.decoder.conv_in.bias += 3.0
    latents = torch.randn(1, 4, 768, 768)
    exact = deepcopy(model).double().decode(latents.double())
    found = model.to(memory_format=layout).decode(latents.contiguous(memory_format=layout))
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[..., ::2],
    ],
    ids=["cut", "transposed", "expanded", "every other"],
)
def test_any_layout_of_the_input_gives_the_same_gradients(view):
    norm, conv = nn.GroupNorm(2, 4).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    found = []
    for context in (nullcontext(), layer_by_layer()):
        leaf = x.clone().requires_grad_()
        with context:
            norm_silu_conv(norm, conv, view(leaf)).square().sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
