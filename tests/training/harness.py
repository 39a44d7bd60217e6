"""Runs that are interrupted from outside: `python harness.py kills|writes|signals COUNT FOLDER`.

A program of its own, because it forks: before anything has started threads, and after the slow imports.
"""

import csv
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae.config.data import DataConfig
from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.optim import OptimConfig
from vae.config.schema import TrainConfig
from vae.training.manifest import HashingFile, newest_whole
from vae.training.train import train

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def small_run(output: Path, workers: int = 0, accumulate: int = 1, keep_best: str | None = None) -> TrainConfig:
    """Twelve updates with every part awake by the end; a checkpoint every third. The best costs as long again."""
    return TrainConfig(
        name="run",
        output=str(output),
        resume="auto",
        updates=12,
        validate_every=3,
        keep_best=keep_best,
        model=AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4),
        loss=LossConfig(
            discriminator_start=2,
            adversarial_start=5,
            adversarial_ramp=2,
            lecam=0.1,
            augment=["color", "cutout"],
            weights=LossWeights(perceptual=0.0),
            discriminator=DiscriminatorConfig(channels=8, layers=2),
        ),
        data=DataConfig(source="photos", resolution=32, batch_size=2, workers=workers),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
        trainer={
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "accumulate_grad_batches": accumulate,
        },
    )


def logged(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the pace, which no two runs share."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: v for name, v in row.items() if not name.startswith("pace/")} for row in csv.DictReader(file)]


def digest_of(run: Path) -> str:
    """Of every tensor of the last checkpoint: networks, averages, running means, the optimiser's moments.

    And of all files of `exports/best`, where there is one.
    """
    checkpoint = torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)
    assert checkpoint["global_step"] == 12
    digest = hashlib.sha256()
    for name, tensor in _tensors({key: checkpoint[key] for key in ("state_dict", "optimizer_states")}):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for path in sorted((run / "exports" / "best").rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def start(config: TrainConfig, slow_writes: bool = False) -> int:
    """The process id of a child that trains; its words go to `log` beside the run."""
    child = os.fork()
    if child:
        return child
    log = os.open(Path(config.output) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if slow_writes:
        write = HashingFile.write

        def slowly(self: HashingFile, data: bytes) -> int:
            time.sleep(0.001)
            return write(self, data)

        HashingFile.write = slowly
    code = 1
    try:
        train(config)
        code = 0
    except SystemExit as stop:
        print(stop, flush=True)
        code = int(str(stop.code))
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(config: TrainConfig) -> str:
    status = end_of(start(config))
    assert status == 0, (Path(config.output) / "log").read_text()[-2000:]
    return digest_of(Path(config.output) / config.name)


def kills(count: int, folder: Path) -> None:
    chance, same = random.Random(0), 0
    rows: list[dict[str, Any]] = [{"keep_best": "psnr"}, {"workers": 2}, {"accumulate": 2}]
    for row in rows:
        began = time.monotonic()
        expected = finish(small_run(_new(folder, "whole"), **row))
        duration = time.monotonic() - began
        for _ in range(count // len(rows)):
            config = small_run(_new(folder, "killed"), **row)
            child = start(config)
            time.sleep(chance.uniform(0.0, duration))
            os.kill(child, signal.SIGKILL)
            end_of(child)
            same += finish(config) == expected
    print(f"{same} of {count} killed runs ended with the same bits")
    assert same == count


def writes(count: int, folder: Path) -> None:
    expected, chance, inside = finish(small_run(_new(folder, "whole"))), random.Random(0), 0
    config = replace(small_run(_new(folder, "killed")), checkpoint_minutes=1e-6)
    checkpoints = Path(config.output) / "run" / "checkpoints"
    for _ in range(count):
        child = start(config, slow_writes=True)
        while not list(checkpoints.glob(".*.ckpt.*.partial")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        end_of(child)
        inside += bool(list(checkpoints.glob(".*.ckpt.*.partial")))
        if list(checkpoints.glob("*.ckpt")):
            newest_whole(checkpoints)
    assert finish(config) == expected
    assert not list(checkpoints.glob(".*.partial"))
    print(f"{count} kills, {inside} of them in the middle of a write of a checkpoint: all recovered, the same bits")
    assert inside >= count // 2


def signals(count: int, folder: Path) -> None:
    expected, chance = finish(small_run(_new(folder, "whole"))), random.Random(0)
    for number in SIGNALS:
        good = 0
        while good < count:
            config = small_run(_new(folder, "stopped"))
            child = start(config)
            time.sleep(chance.uniform(0.1, 1.5))
            os.kill(child, number)
            status = end_of(child)
            if status == 0:
                continue  # it had finished before
            assert status == 128 + number, (status, (Path(config.output) / "log").read_text()[-2000:])
            assert finish(config) == expected
            good += 1
        print(f"{number.name}: {good} of {count} stopped with status {128 + number} and went on to the same bits")


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key in tree:
            yield from _tensors(tree[key], f"{path}/{key}")
    elif isinstance(tree, list):
        for number, branch in enumerate(tree):
            yield from _tensors(branch, f"{path}/{number}")


def _new(folder: Path, name: str) -> Path:
    number = len(list(folder.glob(f"{name}*")))
    made = folder / f"{name}{number}"
    made.mkdir(parents=True)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, how_many, where = sys.argv[1:]
    {"kills": kills, "writes": writes, "signals": signals}[what](int(how_many), Path(where))
