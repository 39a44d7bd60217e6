"""Whose gradient comes from what: each claim holds for our step and fails under a peer's defect."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.traps.bench import (
    ASLEEP,
    PLAYING,
    WARMING_UP,
    Bench,
    assert_close,
    assert_same,
    of,
    on_one_thread,
    with_loss,
    with_weights,
)
from vae.config.loss import LossConfig
from vae.config.schema import TrainConfig
from vae.losses.adversarial import AdversarialLoss
from vae.losses.autoencoder_loss import Objective
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian

# --------------------------------------------------------------------------------------------------------- T5: leaks


def _the_discriminators_loss_is_not_felt_by_the_autoencoder(bench: Bench) -> None:
    alone, beside = (of("autoencoder", bench.gradients(updates)) for updates in (ASLEEP, WARMING_UP))
    assert_same(beside, alone, "the autoencoder's gradient")


def _the_generators_loss_is_not_felt_by_the_discriminator(bench: Bench) -> None:
    alone, beside = (of("discriminator", bench.gradients(updates)) for updates in (WARMING_UP, PLAYING))
    assert_same(beside, alone, "the discriminator's gradient")


def test_the_discriminators_loss_leaves_no_gradient_in_the_autoencoder(tiny_run, monkeypatch):
    """T5: on reconstructions that are not detached, the autoencoder is also trained to help the discriminator."""
    bench = Bench(tiny_run)
    _the_discriminators_loss_is_not_felt_by_the_autoencoder(bench)
    attached: list[Any] = []
    bench.autoencoder.decoder.conv_out.register_forward_hook(lambda _, __, output: attached.append(output))
    original = AdversarialLoss.loss

    def on_attached(self: AdversarialLoss, images: Tensor, _: Tensor, *rest: Any) -> Any:
        return original(self, images, attached[-1], *rest)

    monkeypatch.setattr(AdversarialLoss, "loss", on_attached)
    with pytest.raises(AssertionError, match="the autoencoder's gradient"):
        _the_discriminators_loss_is_not_felt_by_the_autoencoder(bench)


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator(tiny_run, monkeypatch):
    """T5: a backward through a discriminator that is not held constant makes it help the autoencoder."""
    bench = Bench(tiny_run)
    _the_generators_loss_is_not_felt_by_the_discriminator(bench)
    original = AdversarialLoss.gradient

    def by_backward(self: AdversarialLoss, leaf: Tensor, *rest: Any) -> Any:
        self.generator_loss(self.discriminator(leaf.detach())).backward()
        return original(self, leaf, *rest)

    monkeypatch.setattr(AdversarialLoss, "gradient", by_backward)
    with pytest.raises(AssertionError, match="the discriminator's gradient"):
        _the_generators_loss_is_not_felt_by_the_discriminator(bench)


# ---------------------------------------------------------------------------------------------------- T6: perceptual


def _the_perceptual_weight_moves_the_gradient(config: TrainConfig) -> None:
    gradients = []
    for weight in (0.5, 1.5):
        torch.manual_seed(0)
        bench = Bench(with_weights(config, perceptual=weight))
        gradients.append(of("autoencoder", bench.gradients(ASLEEP)))
        assert bench.logged["train/perceptual"] > 0
    for part in ("encoder", "decoder"):
        less, more = (torch.cat([tensor.flatten() for tensor in of(part, state).values()]) for state in gradients)
        assert (more - less).norm() > 1e-3 * less.norm(), f"the perceptual term does not reach the {part}"


def test_the_perceptual_term_is_learned_from_and_not_only_logged(tiny_run, monkeypatch, lpips_net):
    """T6: LPIPS under no_grad is a number in a log, and the training is of the pixel term alone."""
    config = with_loss(tiny_run, perceptual_net=lpips_net)
    _the_perceptual_weight_moves_the_gradient(config)
    monkeypatch.setattr(LPIPS, "forward", torch.no_grad()(LPIPS.forward))
    with pytest.raises(AssertionError, match="does not reach the encoder"):
        _the_perceptual_weight_moves_the_gradient(config)


# ------------------------------------------------------------------------------------------------------- T11: logvar


class LearnedVariance(Objective):
    """LDM's output `logvar`: it divides the reconstruction terms, and its comment alone says that it is trained."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.logvar = nn.Parameter(torch.ones(()))

    def of_images(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        terms = super().of_images(images, reconstructions)
        return terms | {"pixel": terms["pixel"] / self.logvar.exp() + self.logvar}


def _no_loss_owns_a_trainable_parameter(bench: Bench) -> None:
    owned = [value for part in (bench.objective, bench.adversarial_loss) for value in vars(part).values()]
    learning = [value for value in owned if isinstance(value, nn.Parameter)]
    learning += [p for value in owned if isinstance(value, nn.Module) for p in value.parameters() if p.requires_grad]
    assert not learning, "a loss learns"
    networks = {name.split(".")[0] for name, parameter in bench.named_parameters() if parameter.requires_grad}
    assert networks == {"autoencoder", "discriminator"}, "who learns"


@on_one_thread()
def _terms_weigh_what_the_configuration_says(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posteriors: list[DiagonalGaussian] = []
    encode = AutoencoderKL.encode

    def watched(self: AutoencoderKL, images: Tensor) -> DiagonalGaussian:
        posteriors.append(encode(self, images))
        return posteriors[-1]

    seen: list[Any] = []
    bench.autoencoder.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    bench.autoencoder.decoder.conv_out.register_forward_hook(lambda _, __, output: seen.append(output))
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", watched)
        loss = bench.loss(ASLEEP)
    (images, reconstructions), weights = seen, bench.config.loss.weights
    expected = weights.pixel * (images - reconstructions).abs().mean()
    expected = expected + weights.kl * posteriors[-1].kl().sum() / images.numel()
    named = dict(bench.autoencoder.named_parameters())
    wanted = torch.autograd.grad(expected, list(named.values()), retain_graph=True)
    loss.backward()
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    assert_close(found, dict(zip(named, wanted, strict=True)), 1e-5, "the weights of the terms")


def test_every_number_that_weighs_a_term_is_in_the_configuration_and_no_loss_learns(tiny_run, monkeypatch):
    """T11: with a learned output variance, the weight that KL really has stands in no file."""
    config = with_weights(tiny_run, pixel=0.7, kl=0.3)
    _no_loss_owns_a_trainable_parameter(Bench(config))
    _terms_weigh_what_the_configuration_says(Bench(config), monkeypatch)
    monkeypatch.setattr("vae.training.module.Objective", LearnedVariance)
    with pytest.raises(AssertionError, match="a loss learns"):
        _no_loss_owns_a_trainable_parameter(Bench(config))
    with pytest.raises(AssertionError, match="the weights of the terms"):
        _terms_weigh_what_the_configuration_says(Bench(config), monkeypatch)


# ----------------------------------------------------------------------------------- T20: one forward, nothing unused


def _one_forward_serves_both_networks(bench: Bench) -> None:
    counted: list[str] = []
    made: list[Tensor] = []
    judged: list[Tensor] = []
    autoencoder = bench.autoencoder
    for name, part in (
        ("encoder", autoencoder.encoder),
        ("decoder", autoencoder.decoder.mid_block),
        ("last layer", autoencoder.decoder.conv_out),
    ):
        part.register_forward_hook(lambda *_, name=name: counted.append(name))
    autoencoder.decoder.conv_out.register_forward_hook(lambda _, __, output: made.append(output.detach()))
    bench.opponent.register_forward_pre_hook(lambda _, given: judged.append(given[0].detach()))
    for updates in (ASLEEP, WARMING_UP, PLAYING):
        counted.clear()
        bench.gradients(updates)
        assert counted == ["encoder", "decoder", "last layer"], f"one forward at update {updates}"
        learned_from_these = bool(judged) and torch.equal(judged[-1][-len(made[-1]) :], made[-1])
        assert learned_from_these == (updates > ASLEEP), "the very reconstructions"


def test_a_step_is_one_forward_of_the_autoencoder_and_both_networks_learn_from_it(tiny_run, monkeypatch):
    """T20: a forward for either optimiser costs double, and draws another latent and another transform for each."""
    _one_forward_serves_both_networks(Bench(tiny_run))
    bench = Bench(tiny_run)
    original = AdversarialLoss.loss

    def again(self: AdversarialLoss, images: Tensor, _: Tensor, *rest: Any) -> Any:
        return original(self, images, bench.autoencoder(images)[0].detach(), *rest)

    monkeypatch.setattr(AdversarialLoss, "loss", again)
    with pytest.raises(AssertionError, match=f"one forward at update {WARMING_UP}"):
        _one_forward_serves_both_networks(bench)


def _every_trainable_parameter_gets_a_gradient(bench: Bench) -> None:
    learning = {name for name, parameter in bench.named_parameters() if parameter.requires_grad}
    for updates in (ASLEEP, WARMING_UP, PLAYING):
        missing = sorted(learning - bench.gradients(updates).keys())
        assert not missing, f"without a gradient at update {updates}: {missing[:2]}"


def test_every_trainable_parameter_is_in_the_graph_in_every_phase(tiny_run, monkeypatch):
    """T20: else DDP needs find_unused_parameters=True, which walks the graph at every step and hides what is unused."""
    bench = Bench(tiny_run)
    _every_trainable_parameter_gets_a_gradient(bench)
    monkeypatch.setattr(AdversarialLoss, "zero_loss", lambda self: torch.zeros(()))
    with pytest.raises(AssertionError, match=f"without a gradient at update {ASLEEP}: .*discriminator"):
        _every_trainable_parameter_gets_a_gradient(bench)
