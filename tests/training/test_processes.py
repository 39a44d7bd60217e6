"""Several processes on the CPU, over gloo: they train as one, and the end of one is not the silence of the others."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import without_adversary
from tests.training.harness import small_run
from vae.config.schema import TrainConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.training.manifest import checkpoints_in, newest_whole
from vae.weights import save_autoencoder

DRIVEN = Path(__file__).with_name("driven.py")
ALONE = {"OMP_NUM_THREADS": "1"}


def of_processes(config: TrainConfig, count: int, **trainer: Any) -> TrainConfig:
    """`config` as it would be with `count` processes that share each batch."""
    arguments = config.trainer | {"devices": count, "strategy": "ddp" if count > 1 else "auto"} | trainer
    return replace(config, data=replace(config.data, batch_size=4 // count), trainer=arguments)


def begin(config: TrainConfig, *switches: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, *launcher, str(DRIVEN), str(folder / "given.json"), *switches]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ALONE,
        start_new_session=True,
    )


def run(config: TrainConfig, *switches: str, launcher: tuple[str, ...] = ()) -> Path:
    process = begin(config, *switches, launcher=launcher)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return Path(config.output) / "run"


def outcome(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(newest_whole(folder / "checkpoints")[0], weights_only=True)["state_dict"]


def twenty_updates(output: Path) -> TrainConfig:
    """Ten with the discriminator asleep, ten with it awake and felt; every gradient accumulated over two batches."""
    config = small_run(output, accumulate=2)
    loss = replace(config.loss, discriminator_start=10, adversarial_start=10, adversarial_ramp=2, augment=[])
    return replace(config, updates=20, validate_every=10, resume=None, loss=loss)


def differences(folders: dict[int, Path]) -> dict[str, float]:
    """Of two runs' tensors, relative to their norm."""
    ours, theirs = state_of(folders[1]), state_of(folders[2])
    pairs = {name: (ours[name].double(), theirs[name].double()) for name in ours}
    return {name: float((b - a).norm() / (a.norm() + 1e-12)) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_the_double_batch(tmp_path, compiled):
    """In float64, where the bound of 1e-6 is of the algorithm and not of Adam's division of rounding by rounding."""
    config = replace(twenty_updates(tmp_path), compile=compiled)
    folders = {
        count: run(
            of_processes(replace(config, output=str(tmp_path / str(count))), count, precision="64-true"), "double"
        )
        for count in (1, 2)
    }
    first, second = (outcome(folders[2], rank) for rank in (0, 1))
    largest = max(differences(folders).values())
    print(f"rank 0 {first['sha256'][:16]}, rank 1 {second['sha256'][:16]}; from one process at most {largest:.1e}")
    assert first["sha256"] == second["sha256"]
    assert largest < 1e-6
    reductions = [update for update, bucket in first["reductions"] if bucket == 0]
    assert reductions == list(range(20)), "gradients are all-reduced once an update, whatever is accumulated or asleep"
    metrics = [(folders[count] / "metrics.csv").read_text().splitlines() for count in (1, 2)]
    columns = metrics[0][0].split(",")
    for name in ("val/psnr", "val/ssim", "val/latent_std"):
        one, two = (float(rows[-1].split(",")[columns.index(name)]) for rows in metrics)
        assert one == pytest.approx(two, rel=1e-6), name


@pytest.mark.slow
def test_two_processes_make_an_update_that_overflows_again_together(tmp_path):
    """As if it had fitted, in the second attempt too by one all-reduce for both micro-batches."""
    config = replace(small_run(tmp_path, accumulate=2), updates=2, validate_every=2, resume=None)
    config = replace(config, loss=replace(config.loss, discriminator_start=0, adversarial_start=1))
    ends = []
    for switch in ("overflowing", "fitting"):
        folder = run(of_processes(replace(config, output=str(tmp_path / switch)), 2), switch)
        ends += [outcome(folder, rank) for rank in (0, 1)]
    assert len({end["sha256"] for end in ends}) == 1
    high, *_, low = [[update for update, bucket in end["reductions"] if bucket == 0] for end in ends]
    assert low == [0, 1]
    assert len(high) == len(ends[0]["shapes"]) / 2 > 2


@pytest.mark.parametrize(
    "kind",
    [
        "the discriminator first",
        pytest.param("a teacher", marks=pytest.mark.slow),
        "the encoder alone to a teacher",
    ],
)
def test_two_processes_train_as_one_where_parts_sleep_or_have_a_teacher(tmp_path, kind):
    """Each pass must give every parameter that learns a gradient, or processes wait for each other."""
    config = replace(small_run(tmp_path, accumulate=2), updates=6, validate_every=6, resume=None)
    loss = replace(config.loss, discriminator_start=0, adversarial_start=4, augment=[])
    config = replace(config, loss=replace(loss, autoencoder_start=3))
    if "teacher" in kind:
        teacher = str(save_autoencoder(AutoencoderKL(config.model), tmp_path / "teacher"))
        init = str(save_autoencoder(AutoencoderKL(config.model), tmp_path / "init"))
        config = replace(config, loss=loss, teacher=teacher, init=init)
    if "alone" in kind:
        config = replace(without_adversary(config), trained=["encoder", "quant_conv"])
    folders = {
        count: run(
            of_processes(replace(config, output=str(tmp_path / str(count))), count, precision="64-true"), "double"
        )
        for count in (1, 2)
    }
    assert outcome(folders[2], 0)["sha256"] == outcome(folders[2], 1)["sha256"]
    assert max(differences(folders).values()) < (1e-4 if "teacher" in kind else 1e-6)  # a teacher is in float32


def test_processes_whose_gradients_are_not_reduced_are_caught(tmp_path):
    """T3: the mutant's backward never reaches the reducer, as where a forward goes round DDP: two models, one saved."""
    config = of_processes(replace(twenty_updates(tmp_path), updates=2, validate_every=2), 2, precision="64-true")
    folder = run(config, "double", "unreduced")
    assert outcome(folder, 0)["sha256"] != outcome(folder, 1)["sha256"]


def endless(output: Path, minutes: float) -> TrainConfig:
    config = of_processes(small_run(output), 2)
    return replace(config, updates=100_000, validate_every=10, timeout_minutes=minutes)


def wait_for_a_checkpoint(process: "subprocess.Popen[str]", config: TrainConfig) -> None:
    folder = Path(config.output) / "run" / "checkpoints"
    limit = time.monotonic() + 120
    while not checkpoints_in(folder):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.1)


def child_of(process: "subprocess.Popen[str]") -> int:
    """The process that rank 0 started; trained with, not one of its data workers (there are none)."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(children[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_the_loss_of_one_process_ends_the_other_in_time_with_a_message(tmp_path, how):
    config = endless(tmp_path, minutes=0.25)
    process = begin(config)
    wait_for_a_checkpoint(process, config)
    child = child_of(process)
    os.kill(child, how)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    print(
        f"{how.name}: ended with {process.returncode} after {time.monotonic() - began:.1f} s: {said.splitlines()[-1]}"
    )
    assert "lost another" in said or "ended with status -9" in said
    assert process.returncode in {6, -signal.SIGKILL}
    newest_whole(tmp_path / "run" / "checkpoints")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path):
    config = endless(tmp_path, minutes=1.0)
    process = begin(config)
    wait_for_a_checkpoint(process, config)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said[-3000:]
    assert said.count("stopped by SIGTERM after update") == 1


@pytest.mark.slow
def test_a_term_that_is_not_finite_on_one_process_stops_both_and_names_its_image(tmp_path):
    process = begin(of_processes(small_run(tmp_path), 2), "poisoned")
    said, _ = process.communicate(timeout=120)
    print(said.splitlines()[-1])
    assert process.returncode == 5, said[-3000:]
    assert said.count("update 9 is not finite: pixel") == 1
    assert "gradients of" not in said


@pytest.mark.slow
def test_torchrun_starts_a_run_again_after_a_process_died_and_it_ends_with_the_same_bits(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    whole = run(of_processes(small_run(tmp_path / "whole"), 2), launcher=launcher)
    config = of_processes(replace(small_run(tmp_path / "killed"), checkpoint_minutes=1e-6), 2)
    process = begin(config, launcher=launcher)
    wait_for_a_checkpoint(process, config)
    os.kill(child_of(process), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    same = [outcome(Path(config.output) / "run", rank)["sha256"] for rank in (0, 1)]
    assert same == [outcome(whole, rank)["sha256"] for rank in (0, 1)]
