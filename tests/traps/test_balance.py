"""The discriminator's balance: the adaptive weight, its running means, and what is said when the game goes wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import without_adversary
from tests.traps.bench import Bench, assert_same
from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.latents import LatentStatistics
from vae.losses.adversarial import AdversarialLoss, RunningMean, gradient_penalty, lecam_penalty
from vae.losses.diff_augment import AUGMENTATIONS, DRAWS, diff_augment
from vae.models.discriminator import NORMS, PatchDiscriminator
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian
from vae.training.callbacks import WINDOW, Advice
from vae.training.module import AutoencoderModule


def moves_once_an_update(mean: RunningMean) -> None:
    """3, then two micro-batches of 5 and 7, then one that is not finite."""
    mean.blend(torch.tensor(3.0))
    mean.commit()
    assert mean.value == 3.0
    blended = [float(mean.blend(torch.tensor(value))) for value in (5.0, 7.0)]
    assert blended == pytest.approx([3.2, 3.4])
    mean.commit()
    assert float(mean.value) == pytest.approx(3.3)
    assert float(mean.blend(torch.tensor(math.nan))) == pytest.approx(3.3)
    mean.commit()
    assert float(mean.value) == pytest.approx(3.3)


class MovesWithEveryBatch(RunningMean):
    def blend(self, value: Tensor) -> Tensor:
        blended = super().blend(value)
        self.value.copy_(blended)
        self.has_begun.fill_(True)
        return blended


def test_the_adaptive_weight_is_smoothed_and_moves_once_an_update():
    """T13: the mutant moves with each micro-batch; LDM's has no memory and a cap that never binds."""
    moves_once_an_update(RunningMean(0.9))
    for mutant in (MovesWithEveryBatch(0.9), RunningMean(0.0)):
        with pytest.raises(AssertionError):
            moves_once_an_update(mutant)


def _weight_at(config: LossConfig, side: int) -> float:
    """The adaptive weight where the reconstruction's gradient is huge."""
    adversarial_loss = AdversarialLoss(PatchDiscriminator(config.discriminator), config, nn.Conv2d(8, 3, 3, padding=1))
    leaf = torch.rand(2, 3, side, side, requires_grad=True)
    _, logs = adversarial_loss.gradient(leaf, torch.full_like(leaf, 1e6), torch.rand(2, 8, side, side), scale=1.0)
    assert logs["adversarial_share"] < 1e-3
    return float(logs["adaptive_weight"])


def test_the_adaptive_weights_bound_is_the_same_at_every_size_of_image():
    """T13: a bound on sums, as LDM's 1e4, is another one at each size; the older key still means that."""
    config = LossConfig(discriminator=DiscriminatorConfig(8, 2))
    assert [_weight_at(config, side) for side in (16, 32, 48)] == pytest.approx([config.adaptive_bound] * 3)
    assert [_weight_at(replace(config, adaptive_bound=0.5), side) for side in (16, 32)] == [0.5, 0.5]
    older = replace(config, adaptive_maximum=1e2)
    assert [_weight_at(older, side) for side in (16, 32)] == pytest.approx([1e2 / 3 / side**2 for side in (16, 32)])


def means_are_saved(training: AutoencoderModule) -> None:
    state = training.state_dict()
    for name in ("balance", "real_logit", "fake_logit"):
        assert f"adversarial_loss.{name}.value" in state
        assert f"adversarial_loss.{name}.has_begun" in state


def test_running_means_are_in_checkpoints(tiny_run):
    """T18: the mutant keeps LeCam's means as plain numbers, as SEED-Voken and VidTok do."""
    training = AutoencoderModule(tiny_run)
    means_are_saved(training)
    assert training.adversarial_loss is not None
    training.adversarial_loss.real_logit = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AssertionError):
        means_are_saved(training)


BATCH = DiscriminatorConfig(8, 2, "batch")


def opinions(adversarial_loss: AdversarialLoss, images: Tensor, fakes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean logit of the same fakes where the discriminator learns, and where it judges them."""
    leaf = fakes.clone().requires_grad_()
    _, judged = adversarial_loss.gradient(
        leaf, torch.ones_like(leaf), torch.rand(len(leaf), 1, *leaf.shape[2:]), scale=1.0
    )
    _, learned = adversarial_loss.loss(images, fakes)
    return learned["fake_logits"], -judged["adversarial"]


def _game(norm: str, kind: type[AdversarialLoss] = AdversarialLoss) -> AdversarialLoss:
    judge = DiscriminatorConfig(8, 2, norm)
    config = LossConfig(weights=LossWeights(perceptual=0.0), discriminator=judge)
    discriminator = PatchDiscriminator(judge)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(3.0)  # an opinion
    return kind(discriminator, config, nn.Conv2d(1, 3, 3, padding=1))


class NormalisedTogether(AdversarialLoss):
    def _judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        return real_logits, fake_logits


@pytest.mark.parametrize("norm", NORMS)
def test_the_autoencoder_is_judged_by_the_function_that_learned(norm):
    """T16: the mutant normalises fakes with images among them where it learns, and alone where it judges."""
    images, fakes = torch.rand(2, 2, 3, 32, 32) * torch.tensor([2.0, 0.5]).view(2, 1, 1, 1, 1) - 1
    learned, judged = opinions(_game(norm), images, fakes)
    assert learned.item() == pytest.approx(judged.item(), rel=1e-4)
    if norm == "batch":
        learned, judged = opinions(_game(norm, NormalisedTogether), images, fakes)
        assert learned.item() != pytest.approx(judged.item(), rel=0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_images_and_fakes_share_one_forward_where_no_norm_mixes_them(norm):
    adversarial_loss, seen = _game(norm), []
    first = next(module for module in adversarial_loss.discriminator.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    adversarial_loss.loss(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert seen == ([2, 2] if norm == "batch" else [4])


def test_a_batch_norm_that_is_made_synchronous_stays_without_running_statistics():
    """T16: the trainer converts it over several GPUs. Nothing of a forward is left in buffers for the next one."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(PatchDiscriminator(BATCH))
    norms = [module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.track_running_stats for norm in norms)
    assert not list(converted.buffers())
    images = torch.rand(2, 3, 32, 32)
    plain = PatchDiscriminator(BATCH)
    plain.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted(images), plain(images))


def _advise(config: Any, logged: dict[str, float], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said after a window of updates that log this."""
    advice, training = Advice(every=1), AutoencoderModule(config)
    metrics = {f"train/{name}": torch.tensor(value) for name, value in logged.items()}
    trainer: Any = SimpleNamespace(
        is_global_zero=True, accumulate_grad_batches=1, callback_metrics=metrics, global_step=WINDOW
    )
    for update in range(2 * WINDOW):
        advice.on_train_batch_end(trainer, training, None, None, update)
    return capsys.readouterr().err


def test_a_kl_term_that_outweighs_reconstruction_is_said(tiny_run, capsys, monkeypatch):
    """N14: LAV's kl_loss of 1.0; the same terms at LDM's weight are silent. The mutant says nothing, as LAV."""
    terms = {"pixel": 0.2, "kl": 3.0}
    heavy = replace(tiny_run, loss=replace(tiny_run.loss, weights=LossWeights(kl=1.0, perceptual=0.0)))

    def is_said() -> None:
        assert _advise(heavy, terms, capsys).count("the KL term outweighs the reconstruction terms") == 1

    is_said()
    assert _advise(tiny_run, terms, capsys) == ""
    monkeypatch.setattr("vae.training.callbacks.SIGNS", ())
    with pytest.raises(AssertionError):
        is_said()


def test_a_frozen_encoder_has_no_kl_term_however_heavy_its_weight(tiny_run, monkeypatch):
    """N14: LAV's weight of 1.0 beside none. The mutant computes the term of a posterior that cannot move."""

    def gradients(weight: float) -> dict[str, Tensor]:
        weights = LossWeights(kl=weight, perceptual=0.0, adversarial=0.0)
        config = replace(tiny_run, loss=replace(tiny_run.loss, weights=weights), frozen=["encoder", "quant_conv"])
        bench = Bench(config)
        bench.load_state_dict(state)
        found = bench.gradients(0)
        assert "train/kl" not in bench.logged
        assert all(name.startswith(("autoencoder.decoder.", "autoencoder.post_quant_conv.")) for name in found)
        return found

    state = Bench(without_adversary(tiny_run)).state_dict()
    assert_same(gradients(1.0), gradients(0.0), "gradients with a heavy KL weight and with none")
    monkeypatch.setattr("vae.training.step.posterior_learns", lambda _: True)
    with pytest.raises(AssertionError):
        gradients(1.0)


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        ({"discriminator_accuracy": 0.99, "logit_gap": 8.0}, "the discriminator wins"),
        ({"discriminator_accuracy": 0.5, "logit_gap": 0.001}, "the discriminator sleeps"),
        ({"discriminator_accuracy": 0.7, "logit_gap": 1.0, "adversarial_share": 0.3}, "weight stands at its bound"),
    ],
)
def test_a_discriminator_that_wins_sleeps_or_is_held_back_is_said_once(tiny_run, capsys, logged, words):
    assert _advise(tiny_run, {"pixel": 0.2} | logged, capsys).count(words) == 1
    good = {"pixel": 0.2, "discriminator_accuracy": 0.7, "logit_gap": 1.0, "adversarial_share": 1.02}
    assert _advise(tiny_run, good, capsys) == ""


def _validated(training: AutoencoderModule, posterior: DiagonalGaussian, capsys: pytest.CaptureFixture[str]) -> str:
    advice = Advice(every=1)
    training.validation.latents = LatentStatistics(posterior.mean.shape[1])
    training.validation.latents.update(posterior)
    for updates in (10, 20):
        trainer: Any = SimpleNamespace(is_global_zero=True, global_step=updates)
        training.__dict__["_trainer"] = trainer
        advice.on_validation_end(trainer, training)
    return capsys.readouterr().err


def _posterior(logvar: float, idle: bool = False) -> DiagonalGaussian:
    mean = torch.randn(4, 3, 8, 8)
    if idle:
        mean[:, 1] = 0.3
    return DiagonalGaussian(mean, torch.full_like(mean, logvar))


def test_saturated_log_variances_are_counted_and_said(tiny_run, capsys, monkeypatch):
    """N2: the clamp has no gradient outside. The mutant clamps and does not look, as LDM and diffusers."""
    training = AutoencoderModule(tiny_run)

    def is_said() -> None:
        for logvar in LOGVAR_RANGE:
            assert "stand at their bounds" in _validated(training, _posterior(2 * logvar), capsys)
            assert training.validation.latents.clamped_share == 1.0

    is_said()
    assert _validated(training, _posterior(-3.0), capsys) == ""
    assert training.validation.latents.clamped_share == 0.0
    monkeypatch.setattr("vae.latents.LOGVAR_RANGE", (-math.inf, math.inf))
    with pytest.raises(AssertionError):
        is_said()


def test_a_collapsed_channel_is_named(tiny_run, capsys):
    training = AutoencoderModule(tiny_run)
    said = _validated(training, _posterior(-3.0, idle=True), capsys)
    assert "latent channels [1] say nothing" in said
    assert training.validation.latents.channel_is_active.tolist() == [True, False, True]


def test_kl_per_channel_adds_up_to_the_posteriors():
    posterior = _posterior(-2.0)
    statistics = LatentStatistics(3)
    statistics.update(posterior)
    per_image = statistics.channel_kl.sum() * posterior.mean[0, 0].numel()
    torch.testing.assert_close(per_image, posterior.kl().double().mean())


def test_the_gradient_penalty_is_that_of_a_linear_discriminator_on_paper():
    """Of four logits an image, each of a patch of its own."""
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    weight = torch.rand(1, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty(nn.functional.conv2d(images, weight, stride=4), images)
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * weight)


def _penalty_at(side: int, penalty: Callable[[Tensor, Tensor], Tensor]) -> float:
    discriminator = PatchDiscriminator(DiscriminatorConfig(8, 3))
    images = torch.rand(1, 3, side, side).requires_grad_()
    return penalty(discriminator(images), images).item()


def _of_the_sum(real_logits: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(real_logits.sum(), images)[0].square().sum()


def _of_the_mean(real_logits: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(real_logits.mean(), images)[0].square().sum()


def test_the_gradient_penalty_means_the_same_at_every_size_of_image():
    """The mutants differentiate the sum of a patch discriminator's logits, which grows, and their mean, which falls."""

    def ratio(penalty: Callable[[Tensor, Tensor], Tensor]) -> float:
        found = []
        for side in (64, 192):
            torch.manual_seed(0)
            found.append(_penalty_at(side, penalty))
        return found[1] / found[0]

    assert 0.6 < ratio(gradient_penalty) < 1.6
    assert ratio(_of_the_sum) > 5
    assert ratio(_of_the_mean) < 1 / 5


def test_lecam_is_zero_where_logits_keep_to_the_other_sides_mean():
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    assert lecam_penalty(torch.full((4,), -1.0), torch.full((4,), 1.0), high, low) == 0.0
    assert lecam_penalty(torch.full((4,), 2.0), torch.full((4,), -2.0), high, low) == 18.0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_are_differentiable_and_the_same_for_the_same_draws(name):
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    draws = torch.rand(2, DRAWS, dtype=torch.float64)
    augmented = diff_augment(images, draws, [name])
    assert augmented.shape == images.shape
    assert not torch.equal(augmented, images)
    assert torch.equal(augmented, diff_augment(images, draws, [name]))
    assert torch.equal(diff_augment(images[1:], draws[1:], [name]), augmented[1:])
    leaf = images.clone().requires_grad_()
    diff_augment(leaf, draws, [name]).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).any()


def test_the_same_draws_for_both_give_the_discriminator_the_mean_gradient_of_draws_apart():
    """Over three draws, and over the nine pairs of them; the authors draw apart. With noise that is smaller."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    fakes = images + 0.1 * torch.randn_like(images)
    adversarial_loss = _game("group")
    adversarial_loss.discriminator.double()
    draws = torch.rand(3, 2, DRAWS, dtype=torch.float64)

    def gradient(of_images: Tensor, of_fakes: Tensor) -> Tensor:
        """The augmentation is called for images first."""
        given = iter((of_images, of_fakes))
        loss, _ = adversarial_loss.loss(
            images, fakes, lambda batch: diff_augment(batch, next(given), list(AUGMENTATIONS))
        )
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(adversarial_loss.discriminator.parameters()))]
        )

    same = torch.stack([gradient(one, one) for one in draws])
    apart = torch.stack([gradient(one, other) for one in draws for other in draws])
    torch.testing.assert_close(same.mean(dim=0), apart.mean(dim=0))
    assert same.var(dim=0, correction=0).sum() < 0.7 * apart.var(dim=0, correction=0).sum()


def test_a_translation_moves_whole_pixels_and_brings_in_zeros():
    images = torch.arange(1.0, 17.0).expand(1, 1, 16, 16)
    draws = torch.zeros(1, DRAWS)
    draws[0, 3], draws[0, 4] = 0.5, 0.999  # not up or down, and as far as it goes along the width
    moved = diff_augment(images, draws, ["translation"])[0, 0, 0]
    assert moved.tolist() == [*range(3, 17), 0, 0]


def test_a_cutout_is_a_hole_of_half_the_side():
    draws = torch.zeros(1, DRAWS)
    draws[0, 5] = draws[0, 6] = 0.5
    cut = diff_augment(torch.ones(1, 1, 16, 16), draws, ["cutout"])
    assert (cut == 0).sum() == 64


def test_the_kl_term_warms_up(tiny_run):
    """From 1 / length of its weight: seen in the gradient of the encoder's last layer with nothing else to learn."""
    norms = []
    for warmup in (0, 4):
        torch.manual_seed(0)
        weights = LossWeights(pixel=1e-12, perceptual=0.0, kl=1.0, adversarial=0.0)
        bench = Bench(replace(tiny_run, loss=replace(tiny_run.loss, weights=weights, kl_warmup=warmup)))
        for updates in (0, 1, 9):
            norms.append(float(bench.gradients(updates)["autoencoder.quant_conv.weight"].norm()))
    assert [b / a for a, b in zip(norms[:3], norms[3:], strict=True)] == pytest.approx([0.25, 0.5, 1.0], rel=1e-4)
