"""Runs that begin from something: other latent channels, a teacher, a discriminator first, chosen blocks, float16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import without_adversary
from tests.training.test_resume import cut_at
from tests.training.test_train import _columns
from tests.traps.bench import checkpoint_of, rewrite_checkpoint
from vae.config.loss import LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.latents import scale_latents, unscale_latents
from vae.models.autoencoder_kl import AutoencoderKL
from vae.precision.audit import audit_precision
from vae.training.export import export_checkpoint
from vae.training.initialise import initial_state, load_initial_weights
from vae.training.manifest import newest_whole
from vae.training.module import AutoencoderModule
from vae.training.plan.cost import DryRun, Target
from vae.training.plan.plan import plan
from vae.training.step import ForwardPass
from vae.training.train import train
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.latent_files import encoder_digest

ENCODING, DECODING = ["encoder", "quant_conv"], ["decoder", "post_quant_conv"]


@pytest.fixture
def base(tmp_path: Path, tiny: AutoencoderConfig, perturbed) -> Path:
    return save_autoencoder(perturbed(replace(tiny, scaling_factor=0.7)), tmp_path / "base")


@pytest.fixture
def from_base(tiny_run: TrainConfig, base: Path) -> TrainConfig:
    return replace(without_adversary(tiny_run), init=str(base), model=AutoencoderConfig())


def _states(training: AutoencoderModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.state_dict().items()}


def changed(run: Path, base: Path, step: str = "step_0000008") -> set[str]:
    """The parts that learned."""
    before = load_autoencoder(base).state_dict()
    after = load_autoencoder(run / "exports" / step / "diffusers").state_dict()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_only_the_trained_blocks_learn(from_base, base):
    run = train(replace(from_base, trained=["decoder.up_blocks.1", "post_quant_conv"]))
    before = load_autoencoder(base).state_dict()
    after = load_autoencoder(run / "exports" / "step_0000008" / "diffusers").state_dict()
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned
    assert all(name.startswith(("decoder.up_blocks.1.", "post_quant_conv.")) for name in learned)


def test_a_discriminator_learns_first_while_the_autoencoder_stays_as_it_is(tiny_run, base):
    loss = replace(tiny_run.loss, discriminator_start=0, autoencoder_start=4, adversarial_start=4)
    config = replace(tiny_run, init=str(base), model=AutoencoderConfig(), loss=loss)
    run = train(config)
    checkpoint = run / "checkpoints" / "step_0000004.ckpt"
    export_checkpoint(run, checkpoint, torch.device("cpu"))
    assert changed(run, base, "step_0000004") == set()
    saved = torch.load(checkpoint, weights_only=True)
    of_discriminator = [name for name in saved["state_dict"] if name.startswith("discriminator.")]
    moments = saved["optimizer_states"][0]["state"].values()
    assert [one["step"].item() for one in moments] == [4.0] * len(of_discriminator)
    assert "train/discriminator" in _columns(run)
    assert changed(run, base) == {"encoder", "quant_conv", "decoder", "post_quant_conv"}


def test_a_run_that_was_interrupted_while_the_discriminator_learned_alone_ends_with_the_same_bits(
    tiny_run, base, monkeypatch
):
    loss = replace(tiny_run.loss, discriminator_start=0, autoencoder_start=4, adversarial_start=5)
    config = replace(tiny_run, init=str(base), model=AutoencoderConfig(), loss=loss, validate_every=8)
    whole, cut = train(replace(config, name="whole")), cut_at(replace(config, name="cut"), 2, monkeypatch)
    train(replace(config, name="cut", resume=str(cut)))
    states = [torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)["state_dict"] for run in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_with_more_latent_channels_a_run_begins_with_the_reconstructions_of_init(from_base, base, tmp_path):
    config = replace(from_base, latent_channels=8)
    start = initial_state(config, tmp_path / "new")
    training = load_initial_weights(start, AutoencoderModule(start.config)).eval()
    before, images = load_autoencoder(base), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = before.decode(before.encode(images).mode())
        found = training.ema_model.decode(training.ema_model.encode(images).mode())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "3 latent channels of init become 8" in start.notes
    run = train(config)
    exported = load_autoencoder(run / "exports" / "step_0000008" / "diffusers").config
    assert (exported.latent_channels, exported.scaling_factor != 0.7) == (8, True)
    again, _ = export_checkpoint(run, newest_whole(run / "checkpoints")[0], torch.device("cpu"))
    assert load_autoencoder(again[0]).config == exported
    resumed = train(replace(config, updates=10, resume=str(run)))
    assert load_autoencoder(resumed / "exports" / "step_0000010" / "diffusers").config.latent_channels == 8


def test_with_fewer_latent_channels_the_decoder_alone_may_learn(from_base):
    run = train(replace(from_base, latent_channels=2, frozen=ENCODING))
    assert load_autoencoder(run / "exports" / "step_0000008" / "diffusers").config.latent_channels == 2


@pytest.fixture
def teacher(tmp_path: Path, tiny: AutoencoderConfig, perturbed) -> Path:
    """Of another scale and other widths."""
    wide = replace(tiny, block_out_channels=[16, 16], scaling_factor=2.0)
    return save_autoencoder(perturbed(wide), tmp_path / "teacher")


def taught(config: TrainConfig, teacher: Path, **changes: object) -> TrainConfig:
    return replace(without_adversary(config), teacher=str(teacher), **changes)


def test_what_is_decoded_are_the_teachers_latents_in_the_students_units(tiny_run, teacher):
    config = taught(tiny_run, teacher, latents="mean", model=replace(tiny_run.model, scaling_factor=0.5))
    training = load_initial_weights(initial_state(config, Path("none")), AutoencoderModule(config))
    images, model = torch.rand(2, 3, 32, 32) * 2 - 1, load_autoencoder(teacher)
    with torch.no_grad():
        scaled = scale_latents(model.encode(images).mode(), model.config)
        expected = training.autoencoder.decode(unscale_latents(scaled, config.model))
        passed = training.autoencoding([0, 1], images)
    torch.testing.assert_close(passed.reconstructions, expected)
    own = scale_latents(training.autoencoder.encode(images).mean, config.model)
    assert passed.extra_terms["latent"].item() > (own - scaled).square().mean().item() > 0


def test_an_encoder_that_is_the_teacher_has_no_distance_from_it(tiny_run, teacher):
    model = load_autoencoder(teacher)
    config = taught(tiny_run, teacher, model=model.config)
    training = load_initial_weights(initial_state(config, Path("none")), AutoencoderModule(config))
    training.autoencoder.load_state_dict(model.state_dict())
    assert training.autoencoding([0], torch.rand(1, 3, 32, 32)).extra_terms["latent"].item() == pytest.approx(
        0, abs=1e-10
    )


def test_encoder_and_decoder_learn_from_a_teacher_that_is_in_no_checkpoint(tiny_run, teacher):
    run = train(taught(tiny_run, teacher, updates=60, validate_every=30))
    saved = torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)["state_dict"]
    assert not [name for name in saved if "teacher" in name]
    rows = (run / "metrics.csv").read_text()
    assert "train/latent" in rows
    assert "train/kl" not in rows
    resumed = train(taught(tiny_run, teacher, updates=62, validate_every=31, resume=str(run)))
    assert resumed == run


def test_the_encoder_alone_comes_nearer_to_its_teacher_and_nothing_is_decoded(from_base, base, teacher, monkeypatch):
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    config = taught(from_base, teacher, trained=ENCODING, optim=replace(from_base.optim, learning_rate=3e-3))
    with monkeypatch.context() as patch:
        patch.setattr(ForwardPass, "__call__", decoded)  # the way of a training step through the decoder
        run = train(replace(config, updates=80, validate_every=80))
        with pytest.raises(AssertionError, match="decoded"):
            train(replace(config, name="both", trained=[]))
    assert changed(run, base, "step_0000080") == {"encoder", "quant_conv"}
    model, example = load_autoencoder(teacher), torch.rand(4, 3, 32, 32) * 2 - 1

    def distance(path: Path) -> float:
        student = load_autoencoder(path)
        with torch.no_grad():
            latents = [scale_latents(one.encode(example).mean, one.config) for one in (student, model)]
        return (latents[0] - latents[1]).square().mean().item()

    assert distance(run / "exports" / "step_0000080" / "diffusers") < 0.7 * distance(base)
    assert load_autoencoder(run).config.scaling_factor == 0.7  # by which its latents are the teacher's
    again, _ = export_checkpoint(run, newest_whole(run / "checkpoints")[0], torch.device("cpu"))
    assert load_autoencoder(again[0]).config.scaling_factor == 0.7
    assert "train/pixel" not in _columns(run)


def test_weights_that_overflow_float16_are_rescaled_before_a_run_that_asks_for_it(from_base, tiny, perturbed, tmp_path):
    model = perturbed(replace(tiny, scaling_factor=0.7))
    with torch.no_grad():
        for layer in (model.decoder.conv_in, model.decoder.mid_block.resnets[0].conv2):
            layer.weight.mul_(2.0**17)
            layer.bias.mul_(2.0**17)
    images = [torch.rand(1, 3, 32, 32) * 2 - 1]
    assert not audit_precision(model, images).is_safe
    loud = save_autoencoder(model, tmp_path / "loud")
    config = replace(from_base, init=str(loud), fp16_safe=True, frozen=ENCODING)
    loss = replace(config.loss, weights=replace(config.loss.weights, activation=0.1))
    run = train(replace(config, loss=loss))
    safe = load_autoencoder(run / "exports" / "step_0000008" / "diffusers")
    assert audit_precision(safe, images).is_safe
    assert not safe.config.force_upcast
    assert "train/activation" in _columns(run)


REFUSED = [
    ({"frozen": ["encoder"], "trained": ["decoder"]}, "one of them"),
    ({"trained": ["decoder.up_blocks.7"]}, "did you mean 'decoder.up_blocks"),
    ({"latent_channels": 8, "frozen": ENCODING}, "an encoder that learns"),
    ({"latent_channels": 8, "init": None}, "init=MODEL besides"),
    ({"fp16_safe": True, "init": None}, "init=MODEL besides"),
    ({"teacher": "/nowhere"}, "teacher='/nowhere': no such file"),
    ({"teacher": "TEACHER", "frozen": ENCODING, "init": None}, "an encoder that learns, or init=MODEL"),
    ({"teacher": "TEACHER", "trained": ENCODING, "loss": LossConfig()}, "0, as of loss=plain: nothing is decoded"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(from_base, tiny, teacher, changes, message):
    changes = {key: str(teacher) if value == "TEACHER" else value for key, value in changes.items()}
    model = tiny if "init" in changes else AutoencoderConfig()
    with pytest.raises(InputError, match=message):
        train(replace(from_base, model=model, **changes))


def test_a_teacher_of_other_latents_is_refused(tiny_run, tiny, perturbed, tmp_path):
    other = save_autoencoder(perturbed(replace(tiny, latent_channels=5)), tmp_path / "other")
    with pytest.raises(InputError, match="the teacher's 5 channels"):
        train(taught(tiny_run, other))


def test_a_run_does_not_go_on_with_another_teacher_but_may_find_it_elsewhere(tiny_run, tiny, teacher, perturbed):
    run = train(taught(tiny_run, teacher, updates=2, validate_every=2))
    moved = teacher.rename(teacher.with_name("moved"))
    config = taught(tiny_run, moved, updates=4, validate_every=2, resume=str(run))
    train(config)
    save_autoencoder(perturbed(replace(tiny, block_out_channels=[16, 16], scaling_factor=2.0)), moved)
    with pytest.raises(InputError, match="or what makes latents"):
        train(replace(config, updates=6))


def test_a_run_does_not_go_on_with_the_same_tensors_in_another_teacher(tiny_run, teacher):
    config = taught(tiny_run, teacher, updates=2, validate_every=2)
    run, model = train(config), load_autoencoder(teacher)
    for change in ({"norm_num_groups": 8}, {"scaling_factor": 0.3}, {"latents_std": [1.0, 2.0, 3.0]}):
        other = AutoencoderKL(replace(model.config, **change))
        other.load_state_dict(model.state_dict())
        save_autoencoder(other, teacher)
        with pytest.raises(InputError, match="or what makes latents"):
            train(replace(config, updates=4, resume=str(run)))


def test_a_run_that_began_when_the_teachers_configuration_was_not_noted_goes_on(tiny_run, teacher):
    run = train(taught(tiny_run, teacher, updates=2, validate_every=2))

    def as_before(checkpoint: dict[str, Any]) -> None:
        checkpoint["images"] = checkpoint["images"].rpartition(" ")[0]
        assert checkpoint["images"].endswith(encoder_digest(load_autoencoder(teacher).state_dict()))

    before = checkpoint_of(run)["images"]
    rewrite_checkpoint(run, as_before)
    assert checkpoint_of(run)["images"] != before
    train(taught(tiny_run, teacher, updates=4, validate_every=2, resume=str(run)))
    assert checkpoint_of(run)["images"] == before


def test_rescaling_that_changes_images_is_refused(from_base, tiny, perturbed, tmp_path):
    """One channel is far louder than the rest: scaled to it, the others come near the epsilon of their norms."""
    model = perturbed(replace(tiny, norm_num_groups=8))
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(1e-3)
        model.decoder.conv_in.weight[0].mul_(1e9)
    loud = save_autoencoder(model, tmp_path / "loud.safetensors", format="ldm")
    with pytest.raises(InputError, match="rescaling init changes its images"):
        train(replace(from_base, init=str(loud), fp16_safe=True))


def test_a_plan_for_the_encoder_alone_has_no_adversary_and_no_lpips(from_base, teacher):
    made = plan(taught(from_base, teacher, trained=ENCODING, loss=LossConfig(weights=LossWeights(adversarial=0.0))))
    assert {"teacher", "encoder"} <= set(made.networks)
    assert "LPIPS" not in made.networks
    assert [phase.name for phase in made.phases] == ["reconstruction"]
    assert made.networks["teacher"].learning == 0


def test_a_plan_counts_the_teacher_and_the_discriminators_time_alone(tiny_run, base, teacher):
    loss = replace(tiny_run.loss, discriminator_start=0, autoencoder_start=4, adversarial_start=6)
    config = replace(tiny_run, init=str(base), model=AutoencoderConfig(), loss=loss)
    phases = plan(config).phases
    assert [(one.name, one.updates) for one in phases] == [
        ("the discriminator alone", 4),
        ("both learn", 2),
        ("adversarial", 2),
    ]
    assert phases[0].flops < phases[1].flops < phases[2].flops
    costs = [DryRun(one, Target()).cost(1, 0).flops for one in (taught(tiny_run, teacher), without_adversary(tiny_run))]
    assert costs[0] > costs[1]
