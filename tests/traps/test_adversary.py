"""The adversarial loss and its adaptive weight: each claim holds for ours and fails under a peer's defect."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from tests.traps.bench import PLAYING, WARMING_UP, Bench, assert_close, checkpoint_of, of, run, with_loss
from vae.config.loss import DiscriminatorConfig, LossConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.losses.adversarial import ADVERSARIAL_LOSSES
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.discriminator import PatchDiscriminator
from vae.training.module import AutoencoderModule

# ------------------------------------------------------------------------------------- T14: compile and checkpointing


def _names_are_those_of_an_eager_model(state: dict[str, Tensor]) -> None:
    wrapped = [name for name in state if "_orig_mod" in name]
    assert not wrapped, f"names of the compiler: {wrapped[:1]}"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_checkpointed_game_trains_as_an_eager_one_under_the_same_names(tiny_run, monkeypatch, backend):
    """T14: for thirty updates, in place; the first backend plans memory and compiles nothing.

    Its graphs have donated buffers, like those of a GPU: the last of these three tests shows what would break.
    """
    config = replace(tiny_run, updates=30, model=replace(tiny_run.model, block_out_channels=[8]))
    config = with_loss(config, discriminator_start=0, adversarial_start=1, adversarial_ramp=0)
    folder, expected = run(config)
    eager = checkpoint_of(folder)["state_dict"]
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: original(self, backend=backend, **given))
    folder, diary = run(replace(config, compile=True, gradient_checkpointing=True))
    assert ["adaptive_weight" in terms for terms in diary.terms] == [False] + [True] * 29
    compiled = checkpoint_of(folder)["state_dict"]
    _names_are_those_of_an_eager_model(compiled)
    for network in ("autoencoder", "discriminator"):
        for number, (found, wanted) in enumerate(zip(diary.weights, expected.weights, strict=True)):
            assert_close(of(network, found), of(network, wanted), 3e-4, f"{network} after update {number}")
    assert_close(of("ema_model", compiled), of("ema_model", eager), 3e-4, "ema_model")


def test_names_of_the_compiler_are_caught(tiny_run):
    """T14: a compiled wrapper in the module's place renames every weight in the checkpoint."""

    class Wrapped(AutoencoderModule):
        def __init__(self, config: TrainConfig) -> None:
            super().__init__(config)
            self.autoencoder: Any = torch.compile(self.autoencoder, backend="eager")

    _names_are_those_of_an_eager_model(AutoencoderModule(tiny_run).state_dict())
    with pytest.raises(AssertionError, match="names of the compiler"):
        _names_are_those_of_an_eager_model(Wrapped(tiny_run).state_dict())


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (lambda decode: torch.compile(decode, backend="aot_eager"), "donated buffers"),
        (
            lambda decode: lambda z: checkpoint(decode, z, use_reentrant=True),
            "appears to not have been used in the graph",
        ),
    ],
    ids=["compiled", "reentrant"],
)
def test_taming_transformers_adaptive_weight_breaks_in_a_compiled_or_reentrant_region_once_the_game_starts(
    region, message
):
    """T14: the defect itself: gradients of a live graph, the last layer being compiled or recomputed with it."""
    config = AutoencoderConfig(block_out_channels=[4], layers_per_block=1, norm_num_groups=4)
    model = AutoencoderKL(replace(config, mid_block_add_attention=False))
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1))
    decode, last_layer = region(model.decode), model.decoder.conv_out.weight
    images, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 16, 16, requires_grad=True)
    (images - decode(latents)).abs().mean().backward()
    assert last_layer.grad is not None
    reconstructions = decode(latents)
    terms = (images - reconstructions).abs().mean(), -discriminator(reconstructions).mean()
    with pytest.raises(RuntimeError, match=message):
        [torch.autograd.grad(term, last_layer, retain_graph=True) for term in terms]


# --------------------------------------------------------------------------------- T15: adaptive weight and precision


def _adaptive_weight(bench: Bench, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        bench.loss(PLAYING)
    return bench.logged["train/adaptive_weight"]


def _the_adaptive_weight_is(expected: float, bench: Bench, dtype: torch.dtype) -> None:
    found = _adaptive_weight(bench, dtype)
    assert found.dtype == torch.float32, "the precision of the adaptive weight"
    assert found.item() == pytest.approx(expected, rel=0.02), "the adaptive weight"


def _in_half(features: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Unscaled half-precision autograd, as far as the last layer."""
    features, gradient = features.half().float(), gradient.half().float()
    return conv2d_weight(features, list(weight.shape), gradient, padding=1).half().float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_adaptive_weight_is_computed_in_float32_whatever_the_autocast_dtype(tiny_run, monkeypatch, dtype):
    """T15: the gradient of one pixel among many underflows in half precision, and the weight goes to its maximum."""
    side, maximum = 256, 1500.0
    model = replace(tiny_run.model, block_out_channels=[4], mid_block_add_attention=False)
    config = replace(tiny_run, model=model, data=replace(tiny_run.data, resolution=side, batch_size=1))
    judge = DiscriminatorConfig(channels=8, layers=2, norm="none")
    bench = Bench(with_loss(config, discriminator=judge, adaptive_maximum=maximum * 3 * side**2))
    with torch.no_grad():
        for parameter in bench.opponent.parameters():
            parameter.mul_(0.45)
    expected = _adaptive_weight(bench, torch.float32).item()
    assert 0 < expected < 0.9 * maximum
    _the_adaptive_weight_is(expected, bench, dtype)
    if dtype == torch.float16:
        monkeypatch.setattr("vae.losses.adversarial.last_layer_gradient", _in_half)
        with pytest.raises(AssertionError, match=rf"the adaptive weight\n.* {maximum}"):
            _the_adaptive_weight_is(expected, bench, dtype)


# ---------------------------------------------------------------------------------------------------- T17: warming up


class SwitchedTogether(AutoencoderModule):
    """LDM: one factor switches the discriminator's loss and its gradient on, at the same update."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        assert self.adversarial_loss is not None
        self.adversarial_loss.config = replace(config.loss, discriminator_start=config.loss.adversarial_start)


def _the_discriminator_has_learned_before_it_is_felt(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    _, diary = run(config, training)
    start = config.loss.adversarial_start
    felt = ["adversarial" in terms for terms in diary.terms]
    assert felt == [update >= start for update in range(config.updates)]
    moved = diary.moved("discriminator")[:start]
    assert sum(moved) == start - config.loss.discriminator_start, "updates of the discriminator before it is felt"


def test_the_discriminator_learns_before_the_autoencoder_feels_it(tiny_run):
    """T17: a discriminator that begins when its gradient does is the known blow-up."""
    config = with_loss(replace(tiny_run, updates=6), discriminator_start=1)
    _the_discriminator_has_learned_before_it_is_felt(config)
    with pytest.raises(AssertionError, match="updates of the discriminator before it is felt"):
        _the_discriminator_has_learned_before_it_is_felt(config, SwitchedTogether)


def test_the_discriminator_warms_up_and_fades_in_unless_told_otherwise():
    """T17: by the defaults, for those who configure nothing."""
    config = LossConfig()
    assert config.discriminator_start < config.adversarial_start
    assert config.adversarial_ramp > 0


def _share(bench: Bench, updates: int) -> Tensor:
    """What the adversarial term adds to the gradient of the last layer's bias."""
    bias = "autoencoder.decoder.conv_out.bias"
    without = bench.gradients(WARMING_UP)[bias]
    return bench.gradients(updates)[bias] - without


def _the_adversarial_term_fades_in(bench: Bench) -> None:
    config = bench.config.loss
    start, length = config.adversarial_start, config.adversarial_ramp
    full = _share(bench, start + 10 * length)
    for update in range(start, start + length):
        part = (update - start + 1) / length
        share = _share(bench, update)
        assert share.norm().item() == pytest.approx(part * full.norm().item(), rel=1e-3), "the ramp"


def test_the_adversarial_term_reaches_its_weight_by_a_ramp(tiny_run, monkeypatch):
    """T17: and never in one step."""
    bench = Bench(with_loss(tiny_run, adversarial_ramp=4))
    _the_adversarial_term_fades_in(bench)
    monkeypatch.setattr("vae.training.step.ramp", lambda updates, start, length: float(updates >= start))
    with pytest.raises(AssertionError, match="the ramp"):
        _the_adversarial_term_fades_in(bench)


# --------------------------------------------------------------------------------- T17b: saturation, meaning of weights


def _saturating(fake_logits: Tensor) -> Tensor:
    """The minimax loss of a generator by gradient reversal: -BCE(fake, 0)."""
    return -F.softplus(fake_logits).mean()


def _halved(generator_loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Half, for it is one half of 0.5 * (real + fake)."""
    return lambda fake_logits: 0.5 * generator_loss(fake_logits)


def _a_sure_discriminator_is_felt_as_much(config: TrainConfig) -> None:
    bench = Bench(config)
    unsure = _share(bench, PLAYING).norm()
    with torch.no_grad():
        list(bench.opponent.parameters())[-1].sub_(20.0)
    sure = _share(bench, PLAYING).norm()
    assert bench.logged["train/fake_logits"] < -10
    assert sure > 0.5 * unsure, "the gradient of a generator that is found out"


def _the_adversarial_weight_is_that_of_the_generators_loss(
    config: TrainConfig, textbook: Callable[[Tensor], Tensor]
) -> None:
    bench = Bench(config)
    made: list[Tensor] = []
    bench.autoencoder.decoder.conv_out.register_forward_hook(lambda _, __, output: made.append(output.detach()))
    share = _share(bench, PLAYING)
    leaf = made[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(textbook(bench.opponent(leaf)), leaf)
    expected = config.loss.weights.adversarial * gradient.sum(dim=(0, 2, 3))
    assert_close({"share": share}, {"share": expected}, 1e-3, "the adversarial weight")


TEXTBOOK = {"hinge": lambda logits: -logits.mean(), "logistic": lambda logits: -torch.sigmoid(logits).log().mean()}


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_a_generator_that_is_found_out_still_has_its_gradient_and_its_weight(tiny_run, monkeypatch, name):
    """T17b: the saturating loss stops teaching when it matters most, and gradient reversal gives half the weight."""
    config = with_loss(tiny_run, adversarial=name, adaptive=False)
    _a_sure_discriminator_is_felt_as_much(config)
    _the_adversarial_weight_is_that_of_the_generators_loss(config, TEXTBOOK[name])
    generator_loss, discriminator_loss = ADVERSARIAL_LOSSES[name]
    monkeypatch.setitem(ADVERSARIAL_LOSSES, name, (_halved(generator_loss), discriminator_loss))
    with pytest.raises(AssertionError, match="the adversarial weight"):
        _the_adversarial_weight_is_that_of_the_generators_loss(config, TEXTBOOK[name])
    monkeypatch.setitem(ADVERSARIAL_LOSSES, name, (_saturating, discriminator_loss))
    with pytest.raises(AssertionError, match="found out"):
        _a_sure_discriminator_is_felt_as_much(config)
