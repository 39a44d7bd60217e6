"""What a configuration would train on, here or elsewhere, and what can be told of it without starting."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vae.config import TrainConfig
from vae.errors import require
from vae.training.best import Best
from vae.training.folder import folder_of
from vae.training.left_out import LeftOutImages
from vae.training.start import start_of
from vae.training.stopping import StopRequests
from vae.training.trainer import build_trainer, check_arguments

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
ALL = ("-1", "auto")  # devices
ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "strategy": "auto"}


@dataclass(frozen=True)
class Target:
    """What a process trains on: "cpu" or "cuda", one of `AUTOCAST`, among `processes`, so many batches an update."""

    device: str = "cpu"
    precision: str = "32-true"
    processes: int = 1
    accumulate: int = 1

    def autocast(self, device: str) -> torch.autocast:
        """Around a forward pass on tensors of `device`."""
        dtype = AUTOCAST[self.precision]
        return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def target_of(config: TrainConfig) -> Target:
    """float16 needs a GPU, so `auto` means one then."""
    arguments: dict[str, Any] = {"devices": 1} | config.trainer
    check_arguments(arguments)
    accelerator, precision = arguments.get("accelerator", "auto"), arguments.get("precision", "32-true")
    require(accelerator in ACCELERATORS, f"trainer.accelerator={accelerator!r}", f"one of {list(ACCELERATORS)} to plan")
    needs_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and precision == "16-mixed")
    on_gpu = needs_gpu or (accelerator == "auto" and torch.cuda.is_available())
    processes = _devices(arguments["devices"]) * arguments.get("num_nodes", 1)
    return Target("cuda" if on_gpu else "cpu", precision, processes, arguments.get("accumulate_grad_batches", 1))


def _devices(given: Any) -> int:
    """On one machine: a number, a list of them as such or in words, or all GPUs that are here."""
    if isinstance(given, str) and "," in given:
        given = given.strip(",").split(",")
    if isinstance(given, list):
        return len(given)
    known = str(given) in ALL or str(given).isdigit()
    require(known, f"trainer.devices={given!r}", "a number, a list of numbers, or -1 for all")
    return max(1, torch.cuda.device_count() if str(given) in ALL else int(given))


def checked(config: TrainConfig, target: Target) -> TrainConfig:
    """With the architecture that `init` has. The Trainer is built as for one CPU where the run is for GPUs."""
    folder = folder_of(config)
    config = start_of(config, folder).config
    here = ONE_CPU if target.device == "cuda" else {}
    as_if = replace(config, logger="csv", trainer=config.trainer | here)
    requests = StopRequests(config.max_minutes)
    left_out = LeftOutImages(folder, config.data.max_corrupt, 0, requests)
    build_trainer(as_if, folder, requests, left_out, Best(folder, config.best_metric))
    return config


def available_to(target: Target) -> int | None:
    """Bytes for each process: what is free of a GPU, or its share of this machine's memory. None without such a GPU."""
    if target.device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(whole, int(text) if text.isdigit() else whole) // target.processes


def name_of(target: Target) -> str:
    """Of the device, in words."""
    if target.device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU that is not here"


def notes_about(config: TrainConfig, target: Target) -> Iterator[str]:
    """What the numbers leave out."""
    if target.device == "cuda" and not torch.cuda.is_available():
        yield "without a GPU an update is followed as a CPU makes it: operations and memory differ; time is not told"
        if str(config.trainer.get("devices")) in ALL:
            yield "trainer.devices=-1 is counted as one"
    if config.compile:
        yield "compile=true is not followed: less memory and time"
    if config.data.bucket_resolutions:
        yield "every batch is counted as one of the largest bucket"
    if config.loss.weights.adversarial and config.loss.adversarial_start >= config.updates:
        yield f"the adversarial term would start at update {config.loss.adversarial_start}, after the run ends"
    if target.processes > 1:
        yield "the exchange of gradients is not in the time"
    yield f"{1 + -(-config.updates // config.validate_every)} validations, and waiting for images, come on top"
    yield "images, data.latents and the run's folder are looked at when it begins; a run that goes on is planned whole"
