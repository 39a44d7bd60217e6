"""Kills, damage, full disks, two runs in one place, what is not finite: the promise of a run that is never lost.

The long counts are marked slow: `make test-all`.
"""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.harness import digest_of, small_run
from tests.training.test_resume import cut_at
from vae.config.schema import TrainConfig
from vae.data.sources import TRAINING_PHOTOS
from vae.errors import InputError, Stopped
from vae.files import WeightsError
from vae.training.guard import Culprits, nearest_causes
from vae.training.manifest import HashingFile, checkpoints_in, newest_whole
from vae.training.module import AutoencoderModule
from vae.training.step import ForwardPass, Output
from vae.training.train import train

HARNESS = Path(__file__).with_name("harness.py")
ELSEWHERE = Path("/dev/shm")  # another filesystem, where there is one


def interrupted(what: str, count: int, folder: Path) -> str:
    temporary = {"TMPDIR": str(ELSEWHERE)} if ELSEWHERE.is_dir() else {}
    command = [sys.executable, str(HARNESS), what, str(count), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | temporary, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout


@pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits_by_the_same_command(tmp_path, count):
    assert f"{count} of {count} killed runs" in interrupted("kills", count, tmp_path)


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_during_the_write_of_a_checkpoint_are_recovered_from(tmp_path, count):
    assert f"{count} kills" in interrupted("writes", count, tmp_path)


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_signals_stop_a_run_with_their_status_and_it_goes_on_to_the_same_bits(tmp_path, count):
    assert interrupted("signals", count, tmp_path).count(f"{count} of {count} stopped") == 3


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    run = cut_at(config, 7, monkeypatch)
    newest, previous = checkpoints_in(run / "checkpoints")
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    train(config)
    said = capsys.readouterr().out
    assert f"{newest.name}: damaged (its SHA-256 is" in said
    assert f"taking {previous.name} instead" in said
    assert digest_of(run) == digest_of(train(replace(config, name="whole")))


def test_every_truncation_and_every_flipped_bit_is_noticed(tmp_path, monkeypatch):
    run = cut_at(small_run(tmp_path), 7, monkeypatch)
    newest, previous = checkpoints_in(run / "checkpoints")
    whole, bits = newest.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(whole)
        place = int(torch.randint(len(whole), (), generator=bits))
        if torch.rand((), generator=bits) < 1 / 3:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(torch.randint(8, (), generator=bits))
        newest.write_bytes(damaged)
        assert newest_whole(run / "checkpoints")[0] == previous


def test_with_no_whole_checkpoint_all_of_them_are_named(tmp_path, monkeypatch):
    run = cut_at(small_run(tmp_path), 7, monkeypatch)
    for path in checkpoints_in(run / "checkpoints"):
        path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match=r"no checkpoint to go on from \(.*step_0000008.*damaged.*step_0000006"):
        train(small_run(tmp_path))


def test_the_manifest_is_what_sha256sum_checks(tmp_path, monkeypatch):
    folder = cut_at(small_run(tmp_path), 7, monkeypatch) / "checkpoints"
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert names == {path.name for path in checkpoints_in(folder)}
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0


def test_a_disk_too_small_is_refused_before_the_first_update_with_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"checkpoints: needs [\d,]+ bytes and 1,000 are free"):
        train(small_run(tmp_path))


def test_a_disk_that_fills_leaves_the_old_checkpoint_whole_and_says_the_bytes(tmp_path, monkeypatch):
    config, usage = small_run(tmp_path), SimpleNamespace(free=10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    original = AutoencoderModule.training_step

    def step(self: AutoencoderModule, *arguments: Any) -> Any:
        usage.free = 10**9 if self.updates < 4 else 1000
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "training_step", step)
        with pytest.raises(WeightsError, match=r"step_0000006\.ckpt: needs [\d,]+ bytes and 1,000 are free"):
            train(config)
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].name == "step_0000003.ckpt"
    usage.free = 10**9
    assert digest_of(train(config)) == digest_of(train(replace(config, name="whole")))


def _hold(path: Path, ready: Any, done: Any) -> None:
    with path.open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write("process 7 on otherhost\n")
        file.flush()
        ready.set()
        done.wait(60)


def test_a_second_run_in_one_directory_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(run / ".lock", ready, done))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match=r"run: process 7 on otherhost is training there"):
        train(small_run(tmp_path))
    holder.kill()
    holder.join()
    train(small_run(tmp_path))


BAD = float("nan"), float("inf")


def poison(training: AutoencoderModule, where: str, value: float) -> None:
    """Make one thing of the next update not finite, in the running module."""
    adversarial_loss: Any = training.adversarial_loss
    terms = training.objective.image_terms
    decoder_weight, real = (
        training.autoencoder.decoder.conv_in.weight,
        next(iter(adversarial_loss.discriminator.parameters())),
    )

    def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments) * value

    def weight(parameter: Tensor) -> None:
        parameter.data.view(-1)[0] = value

    {
        "pixel": lambda: terms.update(pixel=poisoned(terms["pixel"])),
        "kl": lambda: training.autoencoder.quant_conv.register_forward_hook(lambda *hooked: hooked[-1] * value),
        "adversarial": lambda: setattr(adversarial_loss, "generator_loss", poisoned(adversarial_loss.generator_loss)),
        "discriminator": lambda: setattr(
            adversarial_loss, "discriminator_loss", poisoned(adversarial_loss.discriminator_loss)
        ),
        "autoencoder gradient": lambda: decoder_weight.register_hook(lambda gradient: gradient * value),
        "discriminator gradient": lambda: real.register_hook(lambda gradient: gradient * value),
        "image": lambda: setattr(training, "_images", poisoned(training._images)),
        "autoencoder weight": lambda: weight(decoder_weight),
        "discriminator weight": lambda: weight(real),
    }[where]()


INJECTED = {
    "pixel": "pixel.* of",
    "kl": "pixel, kl",
    "adversarial": "adversarial of",
    "discriminator": "discriminator of",
    "autoencoder gradient": r"gradients of autoencoder\.decoder\.conv_in\.weight",
    "discriminator gradient": r"gradients of discriminator\.main\.0\.weight",
    "image": "pixel",
    "autoencoder weight": r"weights autoencoder\.decoder\.conv_in\.weight",
    "discriminator weight": r"weights discriminator\.main\.0\.weight",
}


def poisoned_run(config: TrainConfig, where: str, value: float, monkeypatch: pytest.MonkeyPatch, at: int = 8) -> None:
    original, done = AutoencoderModule.training_step, []

    def step(self: AutoencoderModule, *arguments: Any) -> Any:
        if self.updates == at and not done:
            done.append(where)
            poison(self, where, value)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "training_step", step)
        train(config)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", INJECTED)
def test_what_is_not_finite_stops_before_the_update_and_is_named(tmp_path, monkeypatch, where, value):
    config = small_run(tmp_path)
    with pytest.raises(Stopped, match=rf"update 9 is not finite: .*({INJECTED[where]})") as stopped:
        poisoned_run(config, where, value, monkeypatch)
    assert stopped.value.code == 5
    if "weight" not in where:
        assert any(name in stopped.value.message for name in TRAINING_PHOTOS)
    newest, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert newest.name == ("step_0000006.ckpt" if "weight" in where else "step_0000008.ckpt")
    state = torch.load(newest, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    for moments in state["optimizer_states"][0]["state"].values():
        assert all(moment.isfinite().all() for moment in moments.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """An optimiser can make them of finite gradients."""

    def spoiled(average: Any, model: Any, updates: int, decay: float) -> None:
        if updates == 6:
            model.decoder.conv_in.weight.data.fill_(float("inf"))

    monkeypatch.setattr("vae.training.module.update_ema", spoiled)
    with pytest.raises(Stopped, match="weights are not finite after update 6: not saved") as stopped:
        train(small_run(tmp_path))
    assert stopped.value.code == 5
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].name == "step_0000003.ckpt"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_update_is_left_out_where_that_is_asked_for_and_the_run_ends_finite(tmp_path, monkeypatch, policy):
    config = replace(small_run(tmp_path), guard=replace(small_run(tmp_path).guard, on_non_finite=policy))
    original, bad = AutoencoderModule.training_step, []

    def step(self: AutoencoderModule, *arguments: Any) -> Any:
        if self.updates in {7, 9} and self.updates not in bad:
            bad.append(self.updates)
            return original(self, *arguments) * float("nan")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderModule, "training_step", step)
        run = train(config)
    state = torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)
    assert state["left_out"] == 2
    assert state["global_step"] == 12
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_a_skipped_update_leaves_nothing_in_a_batch_norm(tmp_path, monkeypatch):
    config = replace(small_run(tmp_path), guard=replace(small_run(tmp_path).guard, on_non_finite="skip"))
    config = replace(config, loss=replace(config.loss, discriminator=replace(config.loss.discriminator, norm="batch")))
    original, done = ForwardPass.__call__, []

    def once(self: ForwardPass, positions: list[int], *arguments: Any, **named: Any) -> Output:
        passed = original(self, positions, *arguments, **named)
        if positions[0] >= 7 * config.data.batch_size and not done:
            done.append(1)
            return passed._replace(reconstructions=passed.reconstructions * float("nan"))
        return passed

    monkeypatch.setattr(ForwardPass, "__call__", once)
    state = torch.load(newest_whole(train(config) / "checkpoints")[0], weights_only=True)
    assert state["left_out"] == 1


class FullDisk(BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_midway_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    original = HashingFile.write

    def full(self: HashingFile, data: bytes) -> int:
        if (tmp_path / "run" / "checkpoints" / "step_0000003.ckpt").exists():
            self._file = FullDisk()
        return original(self, data)

    monkeypatch.setattr(HashingFile, "write", full)
    with pytest.raises(WeightsError, match=r"step_0000006\.ckpt: cannot be written \(No space left on device\)"):
        train(small_run(tmp_path))
    assert newest_whole(tmp_path / "run" / "checkpoints")[0].name == "step_0000003.ckpt"


def test_of_several_processes_the_nearest_cause_is_named_and_not_its_consequences():
    gradients = Culprits(2, "gradients of autoencoder.encoder.conv_in.weight, images innocent.png")
    assert nearest_causes([gradients, Culprits(1, "pixel of guilty.png"), gradients]) == "pixel of guilty.png"
    assert nearest_causes([gradients, gradients]) == gradients.words


def test_leaving_out_is_bounded(tmp_path, monkeypatch):
    guard = replace(small_run(tmp_path).guard, on_non_finite="skip", limit=2)
    with pytest.raises(Stopped, match=r"2 updates were skipped before, guard\.limit=2"):
        poisoned_run(replace(small_run(tmp_path), guard=guard), "pixel", float("nan"), monkeypatch)


def test_the_image_that_is_at_fault_is_named(tmp_path, monkeypatch):
    """One of the batch: the other is not mentioned."""
    original, faulty = AutoencoderModule._images, []

    def images(self: AutoencoderModule, batch: Any) -> Any:
        given = original(self, batch).clone()
        if self.trainer.training and self.updates == 8:
            faulty.append(batch.names[batch.positions.index(max(batch.positions))])
            if max(batch.positions) == 17:
                given[-1, 0, 0, 0] = float("nan")
        return given

    monkeypatch.setattr(AutoencoderModule, "_images", images)
    with pytest.raises(Stopped) as stopped:
        train(small_run(tmp_path))
    assert f"of {faulty[0]}; the weights" in stopped.value.message
