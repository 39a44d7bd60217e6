"""Rows N8, N9 and N15 of the table of traps: what precision a run trains and measures in, what becomes of a number that
is not finite, and whether latents are drawn. Each claim is shown to be false once the peers' defect is put in place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

from tests.conftest import without_adversary
from tests.traps.bench import PLAYING, Bench
from vae.config.model import ARCHITECTURES, AutoencoderConfig
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.errors import InputError
from vae.evaluation.evaluate import evaluate
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import build_autoencoder
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian
from vae.training.module import AutoencoderModule
from vae.training.train import train

BELOW_BF16 = 1e-6  # Adam's first steps are that long; half of bfloat16's spacing at 0.1 is 200 times as much

NETWORKS = ("autoencoder", "ema_model", "discriminator")


@pytest.fixture
def short_run(tiny_run: TrainConfig) -> TrainConfig:
    return replace(without_adversary(tiny_run), updates=2, validate_every=2)


def in_precision(config: TrainConfig, precision: str, name: str) -> TrainConfig:
    return replace(config, name=name, trainer=config.trainer | {"precision": precision})


def checkpoints_of(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*.ckpt"))


def everything_that_learns_is_float32(run: Path) -> None:
    checkpoint = torch.load(checkpoints_of(run)[-1], weights_only=True)
    networks = [tensor for name, tensor in checkpoint["state_dict"].items() if name.split(".")[0] in NETWORKS]
    moments = [t for state in checkpoint["optimizer_states"][0]["state"].values() for t in state.values()]
    assert networks
    assert moments
    assert {tensor.dtype for tensor in networks + moments} == {torch.float32}


def the_smallest_updates_are_kept(run: Path) -> None:
    first, *_, last = checkpoints_of(run)
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, last))
    for network in ("autoencoder.", "ema_model."):
        names = [name for name in before if name.startswith(network)]
        moved = torch.cat([(after[name] != before[name]).flatten() for name in names])
        assert moved.float().mean() > 0.9


def test_weights_moments_and_averages_are_float32_in_a_bf16_run_and_keep_the_smallest_updates(monkeypatch, tiny_run):
    """N8: the mutant casts the model first, as diffusers' trainer does. Half precision throughout is not to be had."""
    config = replace(tiny_run, updates=4, validate_every=2, optim=replace(tiny_run.optim, learning_rate=BELOW_BF16))
    mixed = train(in_precision(config, "bf16-mixed", "mixed"))
    everything_that_learns_is_float32(mixed)
    the_smallest_updates_are_kept(mixed)
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(InputError, match=r"trainer\.precision"):
            train(in_precision(config, precision, "refused"))

    build, encode = AutoencoderKL.__init__, AutoencoderKL.encode

    def build_in_bf16(self: AutoencoderKL, *args: Any) -> None:
        build(self, *args)
        self.to(torch.bfloat16)

    monkeypatch.setattr(AutoencoderKL, "__init__", build_in_bf16)
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, images: encode(self, images.bfloat16()))
    cast_first = train(in_precision(config, "bf16-mixed", "cast"))
    with pytest.raises(AssertionError):
        everything_that_learns_is_float32(cast_first)
    with pytest.raises(AssertionError):
        the_smallest_updates_are_kept(cast_first)


@dataclass
class Decoded:
    """What a decoder was given, and the type of what it made of it."""

    phase: str
    latents: Tensor
    posterior: DiagonalGaussian
    dtype: torch.dtype


@dataclass
class Watch:
    """Over every decoding of a run, within a training or validation step or a phase that a test names."""

    phase: str = ""
    decoded: list[Decoded] = field(default_factory=list)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.phase = phase
        try:
            yield
        finally:
            self.phase = ""

    def take(self) -> list[Decoded]:
        taken, self.decoded = self.decoded, []
        return taken


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, encode, decode_features = Watch(), AutoencoderKL.encode, AutoencoderKL.decode_features
    posteriors: list[DiagonalGaussian] = []

    def watched_encode(self: AutoencoderKL, images: Tensor) -> DiagonalGaussian:
        posteriors[:] = [encode(self, images)]
        return posteriors[0]

    def watched_decode(self: AutoencoderKL, latents: Tensor) -> Tensor:
        features = decode_features(self, latents)
        if watch.phase:
            watch.decoded.append(Decoded(watch.phase, latents.detach(), posteriors[0], features.dtype))
        return features

    monkeypatch.setattr(AutoencoderKL, "encode", watched_encode)
    monkeypatch.setattr(AutoencoderKL, "decode_features", watched_decode)
    for step in ("training_step", "validation_step"):
        monkeypatch.setattr(
            AutoencoderModule, step, within(lambda step=step: watch.during(step), getattr(AutoencoderModule, step))
        )
    return watch


def within(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return inside


def training_computes_in(dtype: torch.dtype, decoded: list[Decoded]) -> None:
    assert {seen.dtype for seen in decoded if seen.phase == "training_step"} == {dtype}


def validation_computes_in_float32(decoded: list[Decoded]) -> None:
    assert {seen.dtype for seen in decoded if seen.phase == "validation_step"} == {torch.float32}


def test_the_precision_of_training_is_what_was_asked_for_and_validations_is_float32(monkeypatch, short_run, watch):
    """N9: the mutant has kukaiN's autocast to float16 around everything, whatever the flag."""
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        train(in_precision(short_run, precision, precision))
        decoded = watch.take()
        training_computes_in(dtype, decoded)
        validation_computes_in_float32(decoded)

    for owner, function in ((AutoencoderModule, "training_step"), (AutoencoderKL, "encode"), (AutoencoderKL, "decode")):
        hard_coded = within(lambda: torch.autocast("cpu", dtype=torch.float16), getattr(owner, function))
        monkeypatch.setattr(owner, function, hard_coded)
    train(in_precision(short_run, "32-true", "hard-coded"))
    decoded = watch.take()
    with pytest.raises(AssertionError):
        training_computes_in(torch.float32, decoded)
    with pytest.raises(AssertionError):
        validation_computes_in_float32(decoded)


def what_is_not_finite_stays_so(bench: Bench) -> None:
    """In every term that sees the reconstructions, and in the scalar that backward is called on."""
    loss = bench.loss(PLAYING)
    assert loss.isnan()
    for name in ("pixel", "perceptual", "adversarial", "discriminator"):
        assert bench.logged[f"train/{name}"].isnan(), name


@pytest.mark.parametrize("lpips_net", ["alex"], indirect=True)
def test_a_loss_that_is_not_finite_is_never_replaced_by_a_number(monkeypatch, tiny_run, lpips_net):
    """N9: kukaiN's trainer puts 0 in place of an LPIPS that is not finite, and trains on."""
    weights = replace(tiny_run.loss.weights, perceptual=1.0)
    bench = Bench(replace(tiny_run, loss=replace(tiny_run.loss, perceptual_net=lpips_net, weights=weights)))
    assert bench.autoencoder.decoder.conv_out.bias is not None
    with torch.no_grad():
        bench.autoencoder.decoder.conv_out.bias[0] = torch.nan
    what_is_not_finite_stays_so(bench)
    distance = LPIPS.forward
    monkeypatch.setattr(LPIPS, "forward", lambda self, a, b: distance(self, a, b).nan_to_num(0.0))
    with pytest.raises(AssertionError, match="perceptual"):
        what_is_not_finite_stays_so(bench)


def encoding_is_the_same_in_both_modes(config: AutoencoderConfig) -> None:
    model, images = build_autoencoder(config), torch.rand(2, config.in_channels, 32, 32) * 2 - 1
    with torch.no_grad():
        trained, used = model.train().encode(images), model.eval().encode(images)
    assert torch.equal(trained.mean, used.mean)
    assert torch.equal(trained.logvar, used.logvar)


def test_the_encoder_is_the_same_function_in_training_mode(monkeypatch, tiny):
    """N15: so that a frozen one may stay in it. The mutant has a dropout, as a network of others might."""
    fixed = ARCHITECTURES["tiny"].fixed
    of_tiny = {"block_out_channels": [8, 8], "architecture": "tiny", **fixed, "mid_block_pool": True}
    for config in (tiny, replace(tiny, **of_tiny)):
        encoding_is_the_same_in_both_modes(config)
    encode = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, images: encode(self, dropout(images, 0.5, self.training)))
    with pytest.raises(AssertionError):
        encoding_is_the_same_in_both_modes(tiny)


def training_draws_latents(decoded: list[Decoded]) -> None:
    noises = [
        (seen.latents - seen.posterior.mean) / seen.posterior.std for seen in decoded if seen.phase == "training_step"
    ]
    assert len(noises) > 1
    for noise in noises:
        assert 0.9 < noise.std() < 1.1
    assert not torch.equal(noises[0], noises[-1])


def measuring_takes_the_mode(decoded: list[Decoded]) -> None:
    measured = [seen for seen in decoded if seen.phase != "training_step"]
    assert {seen.phase for seen in measured} == {"validation_step", "evaluation"}
    assert all(torch.equal(seen.latents, seen.posterior.mean) for seen in measured)


def decodings_of_a_run(config: TrainConfig, watch: Watch) -> list[Decoded]:
    run = train(config)
    with watch.during("evaluation"):
        given = {"name": config.name, "output": f"{config.output}-measured", "data": config.data}
        evaluate(EvaluateConfig(str(run), metrics=["psnr"], probe_images=0, **given))  # pyright: ignore[reportArgumentType]
    return watch.take()


def test_training_draws_latents_while_validation_and_evaluation_take_the_mode(monkeypatch, short_run, watch):
    """N15: which of the two is said, and not what happens to be: the mutants swap them."""
    decoded = decodings_of_a_run(short_run, watch)
    training_draws_latents(decoded)
    measuring_takes_the_mode(decoded)
    with monkeypatch.context() as patch:
        patch.setattr(DiagonalGaussian, "reparameterize", lambda self, _: self.mean)
        with pytest.raises(AssertionError):
            training_draws_latents(decodings_of_a_run(replace(short_run, name="mean"), watch))
    monkeypatch.setattr(DiagonalGaussian, "mode", DiagonalGaussian.sample)
    with pytest.raises(AssertionError):
        measuring_takes_the_mode(decodings_of_a_run(replace(short_run, name="samples"), watch))
