"""Layers that a user has changed or wrapped count as they are: in one pass, in strips, and beside diffusers."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from tests.presets import NETWORKS, TINY
from vae.errors import InputError
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.models.fused import layer_by_layer, nearest_conv, norm_silu, norm_silu_conv, pad_conv
from vae.models.strips import decode_in_strips, encode_in_strips
from vae.weights.formats import to_diffusers_config

Layers = list[tuple[nn.Module, str, Any]]  # (parent, name in it, layer)
LARGEST = 1e-12  # relative, in float64


class Adapted(nn.Module):
    """A layer in another's place, with an addition of low rank beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        shape: Any = base.kernel_size, base.stride, base.padding
        self.down = nn.Conv2d(base.in_channels, 2, *shape, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Louder(nn.Conv2d):
    """One that computes what its class says."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Shifted(nn.GroupNorm):
    """One that computes what its class says."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.2


def _layers(model: nn.Module, kind: type[nn.Module]) -> Layers:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    return [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer) for name, layer in found]


def _padded(model: nn.Module, mode: str) -> None:
    for _, _, conv in _layers(model, nn.Conv2d):
        conv.padding_mode = mode


def _adapted(model: nn.Module) -> None:
    for parent, name, conv in _layers(model, nn.Conv2d):
        setattr(parent, name, Adapted(conv))


def _as_class(model: nn.Module, kind: type[nn.Module], own: type[nn.Module]) -> None:
    for _, _, layer in _layers(model, kind):
        layer.__class__ = own


def _with_another_method(model: nn.Module, name: str) -> None:
    """On the layer itself, as programs that add a LoRA or make images tile do."""
    for _, _, conv in _layers(model, nn.Conv2d):
        method = getattr(conv, name)
        setattr(conv, name, lambda *given, method=method: 1.5 * method(*given))


def _hooked(model: nn.Module, kind: type[nn.Module]) -> None:
    for _, _, layer in _layers(model, kind):
        layer.register_forward_hook(lambda _, __, output: 1.1 * output)


def _hooked_before(model: nn.Module) -> None:
    for _, _, layer in _layers(model, nn.Conv2d):
        layer.register_forward_pre_hook(lambda _, given: (given[0] + 0.1,))


def _hooked_backward(model: nn.Module) -> None:
    for _, _, layer in _layers(model, nn.Conv2d):
        layer.register_full_backward_hook(lambda _, gradients, __: (None if (g := gradients[0]) is None else 2 * g,))


def _hooked_before_backward(model: nn.Module) -> None:
    for _, _, layer in _layers(model, nn.Conv2d):
        layer.register_full_backward_pre_hook(lambda _, gradients: (2 * gradients[0],))


def _normalised(model: nn.Module) -> None:
    for _, _, conv in _layers(model, nn.Conv2d):
        conv = cast(Any, parametrizations.weight_norm(conv))
        conv.parametrizations.weight.original0.data.mul_(1.3)


def _normalised_of_old(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is out of date, and used
        for _, _, conv in _layers(model, nn.Conv2d):
            nn.utils.weight_norm(conv).weight_g.data.mul_(1.3)


def _pruned(model: nn.Module) -> None:
    for _, _, conv in _layers(model, nn.Conv2d):
        prune.l1_unstructured(conv, "weight", 0.5)
        conv.weight_orig.data.mul_(1.3)  # `weight` follows at the next call


def _replaced(model: nn.Module, **changes: Any) -> None:
    for parent, name, conv in _layers(model, nn.Conv2d):
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.in_channels % 4 == conv.out_channels % 4 == 0:
            given = {"padding": 1, "dtype": conv.weight.dtype} | changes
            setattr(parent, name, nn.Conv2d(conv.in_channels, conv.out_channels, 3, **given))


def _without_affine(model: nn.Module) -> None:
    for parent, name, norm in _layers(model, nn.GroupNorm):
        setattr(parent, name, nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False))


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "circular padding": partial(_padded, mode="circular"),
    "reflected padding": partial(_padded, mode="reflect"),
    "a LoRA around it": _adapted,
    "another class": partial(_as_class, kind=nn.Conv2d, own=Louder),
    "another forward": partial(_with_another_method, name="forward"),
    "another _conv_forward": partial(_with_another_method, name="_conv_forward"),
    "forward hook": partial(_hooked, kind=nn.Conv2d),
    "hook before": _hooked_before,
    "backward hook": _hooked_backward,
    "hook before backward": _hooked_before_backward,
    "weight_norm": _normalised,
    "weight_norm as it was": _normalised_of_old,
    "pruned": _pruned,
    "dilated": partial(_replaced, dilation=2, padding=2),
    "in groups": partial(_replaced, groups=2),
    "without bias": partial(_replaced, bias=False),
    "padding in words": partial(_replaced, padding="same"),
    "norm: another class": partial(_as_class, kind=nn.GroupNorm, own=Shifted),
    "norm: forward hook": partial(_hooked, kind=nn.GroupNorm),
    "norm: without affine": _without_affine,
}
WITH_DIFFUSERS = ("circular padding", "reflected padding", "a LoRA around it", "weight_norm", "weight_norm as it was")


def _learned(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Moments, images and all gradients."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    posterior = model.encode(images)
    decoded = model.decode(posterior.mean)
    (decoded.tanh().square().mean() + posterior.logvar.square().mean()).backward()
    found = {"decoded": decoded, "logvar": posterior.logvar, "images": images.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def _furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative; to the largest where a gradient is zero but for rounding."""
    assert found.keys() == wanted.keys()
    least = 1e-4 * max(value.norm().item() for value in wanted.values())
    return max(float((found[key] - wanted[key]).norm() / wanted[key].norm().clamp_min(least)) for key in wanted)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_counts_as_if_all_were_called_one_by_one(change, perturbed):
    model, images = perturbed(NETWORKS["sd-like"]), torch.rand(1, 3, 24, 32, dtype=torch.float64) * 2 - 1
    before = model.double().decode(model.encode(images).mean)
    CHANGES[change](model.double())
    model.double()
    found = _learned(model, images)
    with layer_by_layer():
        wanted = _learned(model, images)
    assert _furthest(found, wanted) < LARGEST
    if "backward" not in change and change != "padding in words":
        assert (found["decoded"] - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize(
    ("layer", "method"), [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.GroupNorm, "forward")]
)
def test_a_method_that_was_replaced_for_all_layers_counts(layer, method, perturbed, monkeypatch):
    """Web UIs add LoRAs and make images tile in this way."""
    model, images = perturbed(NETWORKS["sd-like"]).double(), torch.rand(1, 3, 24, 32, dtype=torch.float64) * 2 - 1
    before = model.encode(images).mean
    original = getattr(layer, method)
    monkeypatch.setattr(layer, method, lambda self, *given: 1.5 * original(self, *given))
    found = model.encode(images).mean
    with layer_by_layer():
        wanted = model.encode(images).mean
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (found - before).norm() > 1e-2 * before.norm()
    with pytest.raises(InputError, match="is not as it was made"):
        decode_in_strips(model, torch.randn(1, 4, 24, 5, dtype=torch.float64))


@pytest.mark.parametrize("change", WITH_DIFFUSERS)
def test_a_changed_model_is_the_one_of_diffusers_changed_alike(change, perturbed):
    config = NETWORKS["sd-like"]
    ours = perturbed(config)
    theirs = cast(Any, Authority.from_config(to_diffusers_config(config))).eval()
    for model in (ours, theirs):
        CHANGES[change](model)
        model.double()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 24, 32, dtype=torch.float64) * 2 - 1
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.decode(expected.mean), theirs.decode(expected.mean).sample, rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", CHANGES)
def test_strips_refuse_a_changed_layer_by_name(change, perturbed):
    model = perturbed(NETWORKS["sd-like"])
    CHANGES[change](model)
    with pytest.raises(InputError, match=r"^decoder\.\S+ is not as it was made, expected .*whole"):
        decode_in_strips(model, torch.randn(1, 4, 24, 5))
    with pytest.raises(InputError, match=r"^encoder\.\S+ is not as it was made, expected .*whole"):
        encode_in_strips(model, torch.rand(1, 3, 64, 16) * 2 - 1)


def test_strips_call_what_stands_in_for_an_attentions_projections(perturbed):
    model, latents = perturbed(NETWORKS["sd-like"]), torch.randn(1, 4, 24, 5)
    for parent, name, linear in _layers(model.decoder, nn.Linear):
        setattr(parent, name, nn.Sequential(linear, nn.Tanh()))
    with torch.no_grad():
        decoded = model.decode(latents)
    torch.testing.assert_close(decode_in_strips(model, latents), decoded, rtol=0, atol=1e-4)


def test_strips_refuse_a_hook_on_a_block(perturbed):
    """A block is taken apart there."""
    model = perturbed(NETWORKS["sd-like"])
    model.decoder.up_blocks[1].register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(InputError, match=r"^decoder\.up_blocks\.1 is not as it was made"):
        decode_in_strips(model, torch.randn(1, 4, 24, 5))


def test_a_tiny_autoencoder_may_have_adapters_too():
    model, images = AutoencoderTiny(TINY()).eval(), torch.rand(1, 3, 32, 32)
    before = model.decode(model.encode(images).mean)
    _adapted(model)
    assert (model.decode(model.encode(images).mean) - before).abs().max() > 1e-3


def _every_layer(model: nn.Module) -> Iterator[nn.Module]:
    """That computes."""
    yield from (each for each in model.modules() if isinstance(each, nn.Conv2d | nn.GroupNorm | nn.Linear))


def test_a_hook_fires_once_for_every_layer_also_where_it_is_on_all_modules(perturbed):
    model, images, seen = perturbed(NETWORKS["sd-like"]), torch.rand(1, 3, 16, 16), []
    handles = [each.register_forward_hook(lambda layer, *_: seen.append(layer)) for each in _every_layer(model)]
    model(images)
    assert len(seen) == len(handles) == len(set(seen))
    for handle in handles:
        handle.remove()
    everywhere: list[nn.Module] = []
    with register_module_forward_hook(lambda layer, *_: everywhere.append(layer)):
        model(images)
    assert [each for each in everywhere if each in set(seen)] == seen


FUNCTIONS = {
    "norm, SiLU and convolution": lambda norm, conv, x: norm_silu_conv(norm, conv, x),
    "norm and SiLU": lambda norm, conv, x: conv(norm_silu(norm, x)),
    "downsampling": lambda norm, conv, x: pad_conv(_with(conv, stride=(2, 2), padding=(0, 0)), norm(x)),
    "upsampling": lambda norm, conv, x: nearest_conv(conv, norm(x)),
}


def _with(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    for name, value in changes.items():
        setattr(conv, name, value)
    return conv


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layers_as_they_were_made_are_compiled_as_one_graph(function):
    norm, conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
    whole = torch.compile(FUNCTIONS[function], backend="eager", fullgraph=True)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(whole(norm, conv, x), FUNCTIONS[function](norm, conv, x))


def test_a_layer_that_is_changed_later_counts_in_a_compiled_model_too():
    norm, conv, x = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
    compiled = torch.compile(norm_silu_conv, backend="eager")
    compiled(norm, conv, x)
    conv.padding_mode = "circular"
    torch.testing.assert_close(compiled(norm, conv, x), conv(F.silu(norm(x))))
