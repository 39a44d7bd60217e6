"""Clock, optimiser and learning rates: each claim holds for our trainer and fails under a peer's defect."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from tests.traps.bench import (
    Bench,
    State,
    assert_close,
    checkpoint_of,
    norm,
    of,
    run,
    with_batch,
    with_loss,
    with_optim,
)
from vae.config.schema import TrainConfig
from vae.data.loader import Batch
from vae.training.module import AutoencoderModule
from vae.training.optim import build_optimiser


class ByHand(AutoencoderModule):
    """Manual optimisation as in LDM's descendants: an optimiser for either network, no schedule, no hook of ours."""

    optimised = ("autoencoder", "discriminator")

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(getattr(self, name).parameters(), 1e-3) for name in self.optimised]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimisers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimiser in optimisers if isinstance(optimisers, list) else [optimisers]:
            optimiser.step()
            optimiser.zero_grad()


# ---------------------------------------------------------------------------------------------------------- T1: clock


def _the_clock_counts_updates_of_the_autoencoder(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    folder, first = run(replace(config, updates=4), training)
    _terms_begin_at_their_update(config, first.terms, accumulate)
    assert len(first.terms) == 4 * accumulate, "batches of four updates"
    _, second = run(replace(config, updates=7, resume=str(folder)), training)
    _terms_begin_at_their_update(config, first.terms + second.terms, accumulate)
    assert len(first.terms + second.terms) == 7 * accumulate, "batches of seven updates"
    assert checkpoint_of(folder)["global_step"] == 7


def _terms_begin_at_their_update(config: TrainConfig, terms: list[set[str]], accumulate: int) -> None:
    for term in ("discriminator", "adversarial"):
        start = getattr(config.loss, f"{term}_start")
        expected = [batch // accumulate >= start for batch in range(len(terms))]
        assert [term in names for names in terms] == expected, f"{term} begins at update {start}"


def test_every_schedule_counts_updates_of_the_autoencoder_with_two_networks_and_after_resume(tiny_run):
    """T1: with an optimiser for either network Lightning's step counts both, and everything comes at half its time."""
    config = with_batch(with_loss(tiny_run, adversarial_start=5), size=2, accumulate=2)
    _the_clock_counts_updates_of_the_autoencoder(config)


@pytest.mark.parametrize(
    ("start", "caught"), [(2, "discriminator begins at update 2"), (100, "batches of four updates")]
)
def test_a_clock_that_counts_both_optimisers_is_caught(tiny_run, start, caught):
    """T1: the defect itself, as in LightningDiT's VA-VAE: terms begin, and the run ends, at half their updates."""
    config = with_loss(tiny_run, discriminator_start=start, adversarial_start=100)
    with pytest.raises(AssertionError, match=caught):
        _the_clock_counts_updates_of_the_autoencoder(config, ByHand)


# ------------------------------------------------------------------------------------------------ T2: turns by batch


class Alternating(AutoencoderModule):
    """Stability's generative-models: every batch trains one network only, by its number."""

    turn = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.turn = batch_idx % 2
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        waiting = self.autoencoder if self.turn else self.discriminator
        assert waiting is not None
        waiting.zero_grad()


def _every_batch_trains_every_network_that_is_awake(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    _, diary = run(config, training)
    start = config.loss.discriminator_start
    ours, theirs = diary.moved("autoencoder"), diary.moved("discriminator")
    assert ours == [True] * config.updates, "autoencoder"
    assert theirs == [update >= start for update in range(config.updates)], "discriminator"


def test_both_networks_learn_from_every_batch_from_the_time_they_are_awake(tiny_run):
    """T2: turns by batch halve the autoencoder's updates, and waste every second batch while the other sleeps."""
    config = replace(tiny_run, updates=5)
    _every_batch_trains_every_network_that_is_awake(config)
    with pytest.raises(AssertionError, match="autoencoder"):
        _every_batch_trains_every_network_that_is_awake(config, Alternating)


# ----------------------------------------------------------------------------------------------- T7: what is optimised


def _every_trainable_parameter_is_optimised_once(config: TrainConfig) -> None:
    module = Bench(config)
    names = {parameter: name for name, parameter in module.named_parameters()}
    grouped = [names[p] for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(learning), f"optimised and trainable parameters: {set(learning) ^ set(grouped)}"


def test_every_trainable_parameter_is_in_the_optimiser_once(tiny_run, monkeypatch):
    """T7: lists written by hand leave quant_conv and post_quant_conv at their random start."""
    _every_trainable_parameter_is_optimised_once(tiny_run)

    def encoder_and_decoder(optim, autoencoder, *rest, **options):
        return build_optimiser(optim, nn.ModuleList([autoencoder.encoder, autoencoder.decoder]), *rest, **options)

    monkeypatch.setattr("vae.training.module.build_optimiser", encoder_and_decoder)
    with pytest.raises(AssertionError, match=r"trainable parameters: .*post_quant_conv"):
        _every_trainable_parameter_is_optimised_once(tiny_run)


# ------------------------------------------------------------------------------------------- T9, T10: learning rates


class NeverStepped(ByHand):
    """lavinal712/AutoencoderKL: schedules are returned, and nobody steps them under manual optimisation."""

    optimised = ("autoencoder",)

    def configure_optimizers(self) -> Any:
        return AutoencoderModule.configure_optimizers(self)


def _learning_rates_follow_the_schedule(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    rates = run(config, training)[1].rates
    optim, updates = config.optim, config.updates
    for network, (rate, start) in enumerate(
        [(optim.learning_rate, 0), (optim.discriminator_learning_rate, config.loss.discriminator_start)]
    ):
        expected = [
            rate
            * min(1.0, (max(0, update - start) + 1) / optim.warmup_updates)
            * 0.5
            * (1 + math.cos(math.pi * update / updates))
            for update in range(updates)
        ]
        assert [both[network] for both in rates] == pytest.approx(expected), "the trace of learning rates"


def test_the_schedule_is_stepped_once_an_update_and_ends_with_the_run(tiny_run, monkeypatch):
    """T9: never stepped under manual optimisation, or stretched by the accumulation over more than the run."""
    config = with_optim(tiny_run, schedule="cosine", warmup_updates=2)
    config = with_batch(replace(config, updates=4), size=2, accumulate=2)
    _learning_rates_follow_the_schedule(config)
    by_hand = replace(config, trainer=tiny_run.trainer)
    with pytest.raises(AssertionError, match="the trace of learning rates"):
        _learning_rates_follow_the_schedule(by_hand, NeverStepped)

    def stretched(optim, ours, theirs, updates, *rest, **options):
        return build_optimiser(optim, ours, theirs, 2 * updates, *rest, **options)

    monkeypatch.setattr("vae.training.module.build_optimiser", stretched)
    with pytest.raises(AssertionError, match="the trace of learning rates"):
        _learning_rates_follow_the_schedule(config)


class ScaledByBatch(AutoencoderModule):
    """LDM's main.py: learning rate = base * accumulation * processes * batch size."""

    def __init__(self, config: TrainConfig) -> None:
        samples = config.data.batch_size * config.trainer.get("accumulate_grad_batches", 1)
        super().__init__(with_optim(config, learning_rate=samples * config.optim.learning_rate))


def _learning_rates_are_literal(config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule) -> None:
    for batch_size, accumulate in ((1, 1), (3, 2)):
        rates = run(with_batch(replace(config, updates=1), batch_size, accumulate), training)[1].rates
        assert rates == [[config.optim.learning_rate, config.optim.discriminator_learning_rate]], "literal rates"


def test_the_learning_rate_is_the_configured_one_whatever_the_batch_and_the_accumulation(tiny_run):
    """T10: the same file must not mean 4.5e-6 in one trainer and 7e-4 in another."""
    config = with_optim(tiny_run, learning_rate=3e-4, discriminator_learning_rate=2e-4)
    _learning_rates_are_literal(config)
    with pytest.raises(AssertionError, match="literal rates"):
        _learning_rates_are_literal(config, ScaledByBatch)


# --------------------------------------------------------------------------------------- T12: accumulation, clipping


class Undivided(AutoencoderModule):
    """The sum of the micro-batches' gradients in place of their mean."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.trainer.accumulate_grad_batches


class DiscriminatorOfTheLast(AutoencoderModule):
    """The discriminator's gradient is zeroed at every micro-batch: accumulation for one network only."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.discriminator is not None:
            self.discriminator.zero_grad()
        return super().training_step(batch, batch_idx)


def _accumulated_gradients_are(
    big: State, config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    accumulated = run(with_batch(config, size=2, accumulate=3), training)[1].gradients[0]
    for network in ("autoencoder", "discriminator"):
        assert_close(of(network, accumulated), of(network, big), 1e-4, network)


def test_accumulated_micro_batches_have_the_gradient_of_one_big_batch_in_both_networks(tiny_run):
    """T12: manual optimisation switches Lightning's accumulation off, and no peer writes its own."""
    config = with_loss(tiny_run, discriminator_start=0, adversarial_start=0, adaptive=False)
    config = replace(config, updates=1)
    big = run(with_batch(config, size=6, accumulate=1))[1].gradients[0]
    _accumulated_gradients_are(big, config)
    for mutant, network in ((Undivided, "autoencoder"), (DiscriminatorOfTheLast, "discriminator")):
        with pytest.raises(AssertionError, match=network):
            _accumulated_gradients_are(big, config, mutant)


class ClippedTogether(AutoencoderModule):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        clip_grad_norm_(self.parameters(), self.config.optim.gradient_clip)


class ClippedAtOne(AutoencoderModule):
    """lavinal712/AutoencoderKL: the bound is written into the code."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        for network in (self.autoencoder, self.discriminator):
            assert network is not None
            clip_grad_norm_(network.parameters(), 1.0)


def _each_network_is_clipped_to_the_configured_bound(
    config: TrainConfig, training: type[AutoencoderModule] = AutoencoderModule
) -> None:
    _, diary = run(config, training)
    bound = config.optim.gradient_clip
    for network in ("autoencoder", "discriminator"):
        raw, clipped = (norm(of(network, state[-1])) for state in (diary.gradients, diary.clipped))
        assert raw > bound
        assert clipped == pytest.approx(bound, rel=1e-3), f"clipped {network}"


def test_each_network_is_clipped_by_itself_to_the_configured_bound(tiny_run):
    """T12: a bound in the code cannot be configured, and a common one lets either network starve the other."""
    config = with_loss(replace(tiny_run, updates=1), discriminator_start=0, adversarial_start=0)
    config = with_optim(config, gradient_clip=1e-3)
    _each_network_is_clipped_to_the_configured_bound(config)
    for mutant in (ClippedTogether, ClippedAtOne):
        with pytest.raises(AssertionError, match="clipped"):
            _each_network_is_clipped_to_the_configured_bound(config, mutant)
