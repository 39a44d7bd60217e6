"""A plan against the run: counted operations and bytes are those of real updates, and nothing is left behind."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tests.conftest import without_adversary
from vae.cli import app
from vae.cli.train import train_and_compare
from vae.config.compose import compose, run
from vae.config.data import DataConfig
from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.training.module import AutoencoderModule
from vae.training.plan import plan as planning
from vae.training.plan.cost import DryRun, Meter, Target, Update, largest_size, random_batch
from vae.training.plan.plan import Plan, Sizing, plan
from vae.training.train import train

PLAYING = 6  # updates done when every part of a tiny run is awake
SMALL_UPDATES = ((32, 4, 1.4), (48, 9, 1.9))  # side, operations, seconds


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small real updates will do."""
    monkeypatch.setattr(planning, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Every part awake from update 4 on, and none that needs weights from elsewhere."""
    return TrainConfig(
        updates=8,
        model=AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4),
        loss=LossConfig(
            discriminator_start=2,
            adversarial_start=4,
            lecam=0.1,
            augment=["color", "cutout"],
            weights=LossWeights(perceptual=0.0),
            discriminator=DiscriminatorConfig(channels=8, layers=2),
        ),
        data=DataConfig(source="photos", resolution=64, batch_size=6, workers=0),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )


@pytest.fixture(scope="module")
def planned(config: TrainConfig) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SECONDS", 0.0)
        return planning.plan(config)


def _run(update: Update, config: TrainConfig) -> None:
    """A real one."""
    batch = random_batch(config, config.data.batch_size, largest_size(config), "cpu")
    for number in range(update.target.accumulate):
        update.backward(update.forward(batch, PLAYING), is_first=number == 0)
    update.step()


CASES = {
    "as it is": ({}, Target()),
    "checkpointed, accumulated, bfloat16": (
        {"gradient_checkpointing": True},
        Target(precision="bf16-mixed", accumulate=2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_and_bytes_of_a_dry_run_are_those_of_a_real_one(config, case):
    """By the same meter on real tensors, by torch's own count, and by what the allocator hands out."""
    changes, target = CASES[case]
    config = replace(config, **changes)
    counter = FlopCounterMode(display=False)
    alone: Any = nullcontext()
    alone.parents = {"Global"}
    counter.mod_tracker = alone  # its own has hooks, which a gradient at a leaf does not allow
    with Meter() as meter:
        update = Update(AutoencoderModule(config), target)
        with counter:
            _run(update, config)
        meter.peak = meter.live
        _run(update, config)
    dry = DryRun(config, target)
    cost = dry.cost(config.data.batch_size, PLAYING)
    assert cost.flops == counter.get_total_flops()
    assert cost.peak == pytest.approx(meter.peak, rel=0.02)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _run(update, config)
    before = sum(tensor.nbytes for tensor in update.training.state_dict().values()) + dry.moments + dry.gradients
    assert cost.peak == pytest.approx(before + _peak(profile), rel=0.15)


CONVOLUTIONS = {
    "3x3": lambda x, w: F.conv2d(x, w, padding=1),
    "1x1": lambda x, w: F.conv2d(x, w[:, :, :1, :1]),
    "downsampling": lambda x, w: F.conv2d(x, w, stride=2, padding=2),
    "upsampling": lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_convolution_takes_inside_its_kernel_is_counted(name, backwards):
    """Of float64, for which no CPU has a better one: so bfloat16 is computed where instructions for it are missing."""
    x, weight = torch.randn(3, 16, 32, 32).double(), torch.randn(16, 16, 3, 3).double()
    gradient = torch.randn_like(CONVOLUTIONS[name](x, weight))
    x.requires_grad_(backwards)

    def made() -> Tensor:
        result = CONVOLUTIONS[name](x, weight)
        return torch.autograd.grad(result, x, gradient)[0] if backwards else result

    made()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made()
    with Meter() as meter:
        made()
    known = sum(tensor.nbytes for tensor in (x, weight, gradient))
    assert abs(meter.peak - _peak(profile)) < known, (meter.peak, _peak(profile))


def _peak(profile: Any) -> int:
    """Bytes that were in use at most, above those before."""
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


def test_parameters_and_what_learns_are_those_of_the_networks(config, planned):
    training = AutoencoderModule(config)
    assert training.discriminator is not None
    for name, network in {"autoencoder": training.autoencoder, "discriminator": training.discriminator}.items():
        numbers = sum(parameter.numel() for parameter in network.parameters())
        assert (planned.networks[name].parameters, planned.networks[name].learning) == (numbers, numbers)
    frozen = plan(replace(config, frozen=["encoder", "quant_conv"]))
    assert frozen.networks["encoder"].learning == 0
    assert frozen.networks["autoencoder"].flops < planned.networks["autoencoder"].flops
    assert frozen.memory.parts["optimiser"] < planned.memory.parts["optimiser"]


def test_phases_are_those_of_the_schedule(config, planned):
    assert [phase.updates for phase in planned.phases] == [2, 2, 4]
    operations = [phase.flops for phase in planned.phases]
    assert operations == sorted(set(operations))
    seconds = sum(phase.updates * phase.seconds for phase in planned.phases)
    assert planned.hours == pytest.approx(seconds / 3600)
    assert planned.epochs == 8 * 6 / 11
    assert planning._spans(without_adversary(config)) == [("reconstruction", 0, 8)]
    assert [span[2] for span in planning._spans(replace(config, updates=3))] == [2, 1]


def test_time_is_a_line_through_the_two_largest_updates():
    small, large = (planning._Made(1, (side, side), flops, passing, 0.5, 0.0) for side, flops, passing in SMALL_UPDATES)
    found = planning._pace([small, large])
    assert found.seconds(10, batches=1) == pytest.approx(10 * 0.1 + 1.0 + 0.5)
    assert found.seconds(20, batches=2) == pytest.approx(20 * 0.1 + 2.0 + 0.5)
    out_of_order = planning._pace([large, replace(small, flops=50)])
    assert (out_of_order.per_flop, out_of_order.per_batch) == (1.4 / 50, 0)


def test_what_does_not_fit_is_told_with_remedies_and_what_would(config, monkeypatch):
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    sizing = Sizing(DryRun(config, Target()), PLAYING)
    memory = sizing.memory(sizing.needed(4.5))
    assert memory.fits is False
    assert memory.largest_batch == 4
    overrides = [remedy.overrides for remedy in memory.remedies]
    smaller = "data.batch_size=3 trainer.accumulate_grad_batches=2"
    assert overrides == ["gradient_checkpointing=true", smaller, "trainer.precision=bf16-mixed"]
    assert max(remedy.needed for remedy in memory.remedies) < memory.needed


def test_many_processes_share_the_images_and_exchange_gradients(config, planned):
    many = plan(replace(config, trainer=config.trainer | {"devices": 2, "accumulate_grad_batches": 3}))
    assert (many.processes, many.images_per_update, many.images_seen) == (2, 36, 288)
    assert many.reduced == planned.memory.parts["gradients"]
    assert many.phases[-1].flops == 6 * planned.phases[-1].flops
    assert many.networks == planned.networks


def test_a_preset_for_a_gpu_is_planned_where_there_is_none():
    small = ("updates=100", "trainer.accumulate_grad_batches=1")  # one phase, one batch
    elsewhere = ("data=folder", "data.root=/elsewhere", "trainer.precision=16-mixed")
    found = plan(compose("experiment=ldm_f8c4", *elsewhere, *small))
    assert found.networks["autoencoder"].parameters == 83_653_863
    assert found.memory.parts["averages"] == 4 * 83_653_863
    assert (found.images_per_update, found.epochs) == (12, None)
    if not torch.cuda.is_available():
        assert (found.memory.fits, found.pace, found.hours) == (None, None, None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`python train.py OVERRIDES` in an empty folder; gives its status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*overrides: str) -> object:
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        try:
            run("train", train_and_compare, sys.argv)
        except SystemExit as end:
            return end.code
        return 0

    return call


SMALL = ("model=tiny", "data.resolution=32", "loss.weights.perceptual=0", "trainer.accelerator=cpu", "updates=10")


def test_planning_says_what_it_found_and_writes_nothing(command, capsys, tmp_path):
    assert command(*SMALL, "plan=true") == 0
    said = capsys.readouterr().out
    assert "159,383" in said
    assert "FITS" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.precision=8", "trainer.precision"),
        ("trainer.precision=16-mixed", "trainer.precision"),
        ("+trainer.max_steps=5", "trainer.max_steps"),
        ("+trainer.profiler=none", "trainer"),
        ("trainer.accelerator=tpu", "trainer.accelerator"),
        ("data.resolution=33", "data.resolution"),
        ("resume=/nowhere", "resume"),
        ("init=/nowhere", "init"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(command, capsys, override, key):
    assert command(*SMALL, override, "plan=true") == 2
    assert capsys.readouterr().err.startswith(f"error: {key}")


def test_the_command_leaves_the_values_of_a_run_to_the_door_that_reads_them():
    refused = CliRunner().invoke(app, ["plan", "resume=runs/first"])
    assert "vae train resume=runs/first plan=true" in str(refused.exception)


def test_the_command_gives_the_numbers_as_json(planned, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "plan", lambda config: asked.append(config) or planned)
    found = json.loads(CliRunner().invoke(app, ["plan", *SMALL, "--json"]).stdout)
    assert asked == [compose(*SMALL)]
    assert found["networks"]["autoencoder"]["parameters"] == planned.networks["autoencoder"].parameters
    assert found["memory"]["fits"] is True
    assert found["hours"] == planned.hours


def test_a_batch_that_fits_is_found_and_the_images_of_an_update_stay(config, monkeypatch):
    """Six images an update: three at a time where memory is for four, all of them where there is enough."""
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "_is_made", lambda *_: True)
    six = replace(config, data=replace(config.data, batch_size=6), auto_batch_size=True)
    needed = {size: Sizing(DryRun(in_batches(six, size), Target(accumulate=6 // size)), PLAYING) for size in (1, 3, 6)}

    for available, size in ((needed[6].needed(6), 6), (needed[3].needed(3) + 1, 3), (needed[1].needed(1) + 1, 1)):
        monkeypatch.setattr(planning, "available_to", lambda _, bytes_=available: bytes_)
        found = planning.with_fitting_batch(six)
        assert (found.data.batch_size, found.trainer["accumulate_grad_batches"]) == (size, 6 // size)
        assert not found.auto_batch_size

    monkeypatch.setattr(planning, "available_to", lambda _: 1000)
    with pytest.raises(InputError, match="not even one image of an update fits"):
        planning.with_fitting_batch(six)


def in_batches(config, size):
    trainer = config.trainer | {"accumulate_grad_batches": 6 // size}
    return replace(config, data=replace(config.data, batch_size=size), trainer=trainer)


def test_a_batch_that_the_plan_lets_in_and_the_gpu_does_not_is_made_smaller(config, monkeypatch):
    """One real update tells: kernels take memory that no plan knows."""
    tried: list[int] = []

    def make(config, update, updates, images, size):
        tried.append(images)
        if images > 2:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(planning, "_make", make)
    six = replace(config, data=replace(config.data, batch_size=6))
    assert planning.with_fitting_batch(six).data.batch_size == 2
    assert tried == [6, 3, 2]


def test_auto_is_typed_as_the_batch_size():
    assert compose("experiment=quickstart", "data.batch_size=auto").auto_batch_size
    assert compose("experiment=quickstart", "data.batch_size=auto").data.batch_size == 8


def test_auto_needs_one_device_and_is_chosen_before_training(config):
    two = replace(config, trainer=config.trainer | {"devices": 2})
    with pytest.raises(InputError, match="without one device, here: expected a number"):
        planning.with_fitting_batch(two)
    with pytest.raises(InputError, match=r"auto_batch_size=true, expected a number of data\.batch_size"):
        train(replace(config, auto_batch_size=True))
