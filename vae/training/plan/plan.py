"""Whether a run fits into its device's memory, and by which overrides it would.

How fast this machine makes updates: real ones of random images, as large as a few seconds allow.

`plan`: what a run will take, before it is started. No image is looked at and nothing is written."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vae.config.schema import SMALLEST_PERCEPTUAL_IMAGE, TrainConfig
from vae.data.build import open_sources
from vae.training.checkpointing import KEPT, Best, bytes_in, checkpoint_bytes
from vae.training.initialise import teacher_of
from vae.training.plan.cost import (
    DryRun,
    Meter,
    Size,
    Target,
    Update,
    available_to,
    checked,
    largest_size,
    name_of,
    notes_about,
    random_batch,
    target_of,
)
from vae.training.resume import folder_of
from vae.training.train import build_module

MARGIN = 1.1  # as measured on CPUs: kernels' workspaces, and what an allocator cannot use again


@dataclass(frozen=True)
class Remedy:
    """Overrides by which a run takes less memory, the bytes that it needs then, and whether they are there."""

    overrides: str
    needed: int
    fits: bool


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes. `parts` are what lives at the peak; `needed` is their sum with the margin.

    `available` is a GPU's free memory or a CPU's whole, shared by the processes; it is None, as all that follows from
    it, where the device is elsewhere. `largest_batch` is what would fit of `data.batch_size`.
    """

    parts: dict[str, int]
    needed: int
    available: int | None
    fits: bool | None
    largest_batch: int | None
    remedies: list[Remedy]


class Sizing:
    """Bytes that a dry run needs, linear in the images of a batch: from the batch as it is, and from one of one image.

    `updates` are those done at the dearest update of the run.
    """

    def __init__(self, dry: DryRun, updates: int) -> None:
        self.dry, self.updates, self.batch = dry, updates, dry.config.data.batch_size
        self.cost = dry.cost(self.batch, updates)
        other = 1 if self.batch > 1 else 2
        self._slope = (self.cost.peak - dry.cost(other, updates).peak) / (self.batch - other)
        self.program = _resident() if dry.target.device == "cpu" else 0

    def needed(self, images: float) -> int:
        """For a batch of so many images of the largest size."""
        peak = self.cost.peak + self._slope * (images - self.batch)
        return round(MARGIN * (peak + self.program))

    def for_size(self, images: int, size: Size) -> int:
        """For a batch of smaller images."""
        height, width = largest_size(self.dry.config)
        return self.needed(images * size[0] * size[1] / (height * width))

    def largest(self, available: int) -> int:
        """Images in a batch that fits; 0 where none does."""
        return max(0, int((available - self.needed(0)) / (MARGIN * self._slope)))

    def memory(self, available: int | None) -> Memory:
        training = self.dry.training
        lpips = training.objective.lpips
        parts = {
            "weights": sum(bytes_in(network.state_dict()) for network in training.networks.values()),
            "averages": bytes_in(training.ema_model.state_dict()),
            "LPIPS": 0 if lpips is None else bytes_in(lpips.state_dict()),
            "gradients": self.dry.gradients,
            "optimiser": self.dry.moments,
            "activations": self.cost.saved,
        }
        parts["temporary"] = self.cost.peak - sum(parts.values())
        if self.program:
            parts["program"] = self.program
        needed = self.needed(self.batch)
        if available is None:
            return Memory(parts, needed, None, None, None, [])
        remedies = [] if needed <= available else [one for one in self._remedies(available) if one.needed < needed]
        return Memory(parts, needed, available, needed <= available, self.largest(available), remedies)

    def _remedies(self, available: int) -> Iterator[Remedy]:
        """Each by itself, the one that changes least first."""
        config, target = self.dry.config, self.dry.target

        def remedy(overrides: str, config: TrainConfig, target: Target = target) -> Remedy:
            cost = DryRun(config, target).cost(config.data.batch_size, self.updates)
            needed = round(MARGIN * (cost.peak + self.program))
            return Remedy(overrides, needed, needed <= available)

        if not config.gradient_checkpointing:
            yield remedy("gradient_checkpointing=true", replace(config, gradient_checkpointing=True))
        if self.batch > 1:
            kept = round(MARGIN * self.dry.gradients)  # from batch to batch
            most = max(1, self.largest(available - kept))
            batch = max(size for size in range(1, self.batch) if self.batch % size == 0 and size <= most)
            accumulate = target.accumulate * self.batch // batch
            smaller = replace(config, data=replace(config.data, batch_size=batch))
            overrides = f"data.batch_size={batch} trainer.accumulate_grad_batches={accumulate}"
            yield remedy(overrides, smaller, replace(target, accumulate=accumulate))
        if target.precision == "32-true":
            yield remedy("trainer.precision=bf16-mixed", config, replace(target, precision="bf16-mixed"))


def _resident() -> int:
    """Bytes of this program as it is, which a training has too."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statistics.is_file() else 0


SECONDS = 8.0  # after which no larger update is tried
TIMED = 2  # of an update the fastest counts: what else runs makes others slower


@dataclass(frozen=True)
class Pace:
    """Seconds of an update: `per_flop` for a floating-point operation of forward and backward, `per_batch` besides for
    each batch, to walk through the weights, and `per_step` for the optimiser and the averages.

    From the two largest updates that were made, of which one had so many `images` of `size`.
    """

    per_flop: float
    per_batch: float
    per_step: float
    images: int
    size: Size

    def seconds(self, flops: float, batches: int = 1) -> float:
        """Of an update."""
        return self.per_flop * flops + self.per_batch * batches + self.per_step


@dataclass(frozen=True)
class _Made:
    """An update of one batch, and its seconds before and in the step."""

    images: int
    size: Size
    flops: int
    passing: float
    stepping: float


def measure_pace(
    config: TrainConfig, target: Target, updates: int, can_hold: Callable[[int, Size], bool]
) -> Pace | None:
    """By updates that each are larger than the one before; None where memory can hold not even the first.

    `updates` are those done, on which depends what an update consists of. `can_hold(images, size)` says what fits.
    """
    made: list[_Made] = []
    update, start = None, time.perf_counter()
    for images, size in _growing(config):
        spent = time.perf_counter() - start
        if not can_hold(images, size) or (len(made) > 1 and spent + _expected(made[-1], images, size) > SECONDS):
            break
        update = update or _real_update(config, target)
        made.append(_make(config, update, updates, images, size))
    return _pace(made) if made else None


def _pace(made: list[_Made]) -> Pace:
    """A line through the last two; through the origin where there is one, or where they are out of order."""
    last = made[-1]
    rise = last.passing - made[-2].passing if len(made) > 1 else 0.0
    per_flop = rise / (last.flops - made[-2].flops) if rise > 0 else 0.0
    if not 0 < per_flop * last.flops <= last.passing:
        per_flop = last.passing / last.flops
    return Pace(per_flop, last.passing - per_flop * last.flops, last.stepping, last.images, last.size)


def _expected(last: _Made, images: int, size: Size) -> float:
    """Seconds to measure a larger one."""
    growth = images * size[0] * size[1] / (last.images * last.size[0] * last.size[1])
    return (1 + TIMED) * (growth * last.passing + last.stepping)


def _growing(config: TrainConfig) -> Iterator[tuple[int, Size]]:
    """One image, its sides grown by half up to the largest; then more of them up to the batch."""
    largest, factor = largest_size(config), config.model.downsample_factor
    smallest = max(SMALLEST_PERCEPTUAL_IMAGE, config.loss.discriminator.smallest_image)
    side = -(-smallest // factor) * factor
    while side < min(largest):
        yield 1, (side, side)
        side = -(-3 * side // (2 * factor)) * factor
    images = 1
    while images < config.data.batch_size:
        yield images, largest
        images *= 2
    yield config.data.batch_size, largest


def _real_update(config: TrainConfig, target: Target) -> Update:
    training = build_module(replace(config, compile=False)).to(target.device)
    training.objective.to(torch.device(target.device))
    training.autoencoding.teacher = teacher_of(config)
    training.autoencoding.to(torch.device(target.device))
    return Update(training, target)


def _make(config: TrainConfig, update: Update, updates: int, images: int, size: Size) -> _Made:
    """The first such update warms up and is counted."""
    batch = random_batch(config, images, size, update.target.device)
    with Meter() as meter:
        update.backward(update.forward(batch, updates))
    update.step()
    passing = stepping = math.inf
    for _ in range(TIMED):
        began = _now(update.target.device)
        update.backward(update.forward(batch, updates))
        between = _now(update.target.device)
        update.step()
        passing = min(passing, between - began)
        stepping = min(stepping, _now(update.target.device) - between)
    return _Made(images, size, meter.flops, passing, stepping)


def _now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


ASLEEP = -1  # updates done, before any discriminator starts
RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class Network:
    """Parameters, how many of them learn, and floating-point operations for each training image, with all terms active
    and in both directions. None where they are counted with the whole.
    """

    parameters: int
    learning: int
    flops: float | None


@dataclass(frozen=True)
class Phase:
    """Updates that consist of the same: floating-point operations of one, on all processes, and its seconds."""

    name: str
    updates: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Disk:
    """Bytes of a checkpoint, of all checkpoints and the best export while they are written, and that are free."""

    checkpoint: int
    needed: int
    available: int


@dataclass(frozen=True)
class Plan:
    """`pace` is what the seconds are predicted from, and with them it is None where the device is elsewhere.

    Epochs are None where images are not counted. `reduced` are bytes of gradients that each process exchanges an
    update. `notes` say what is not in the numbers.
    """

    networks: dict[str, Network]
    phases: list[Phase]
    pace: Pace | None
    memory: Memory
    disk: Disk
    device: str
    processes: int
    images_per_update: int
    images_seen: int
    epochs: float | None
    reduced: int
    notes: list[str]

    @property
    def hours(self) -> float | None:
        """Of all updates, without validations."""
        seconds = [None if one.seconds is None else one.updates * one.seconds for one in self.phases]
        return None if None in seconds else sum(filter(None, seconds)) / 3600


def plan(config: TrainConfig) -> Plan:
    """Follow an update of `config` on tensors without contents; where its device is here, make some small real ones.

    Refuses with InputError what a run would refuse, but for its images and for devices that are elsewhere.
    """
    target = target_of(config)
    config = checked(config, target)
    *earlier, (name, start, updates) = _spans(config)
    dry, batch = DryRun(config, target), config.data.batch_size
    sizing, available = Sizing(dry, start), available_to(target)
    pace = None
    if available is not None:
        pace = measure_pace(config, target, start, lambda images, size: sizing.for_size(images, size) <= available)
    asleep = dry.cost(1, ASLEEP).flops
    flops = [
        (one, count, batch * (asleep if one == RECONSTRUCTION else dry.cost(1, first).flops))
        for one, first, count in earlier
    ]
    flops.append((name, updates, sizing.cost.flops))
    together = batch * target.processes * target.accumulate
    images = len(open_sources(config.data)[0]) if config.data.source == "photos" else None
    return Plan(
        networks=_networks(dry, asleep / target.accumulate, sizing.cost.flops / (batch * target.accumulate)),
        phases=[
            Phase(one, count, target.processes * each, None if pace is None else pace.seconds(each, target.accumulate))
            for one, count, each in flops
        ],
        pace=pace,
        memory=sizing.memory(available),
        disk=_disk(config, dry),
        device=name_of(target),
        processes=target.processes,
        images_per_update=together,
        images_seen=config.updates * together,
        epochs=None if images is None else config.updates * together / images,
        reduced=dry.gradients if target.processes > 1 else 0,
        notes=list(notes_about(config, target)),
    )


def _spans(config: TrainConfig) -> list[tuple[str, int, int]]:
    """(name, first update, number of updates) of each part of the run."""
    loss, begun = config.loss, {0: RECONSTRUCTION}
    if loss.weights.adversarial:
        begun |= {loss.discriminator_start: "the discriminator learns"}
        begun |= {0: "the discriminator alone", loss.autoencoder_start: "both learn"} if loss.autoencoder_start else {}
        begun |= {loss.adversarial_start: "adversarial"}
    ends = [*list(begun)[1:], config.updates]
    spans = [
        (name, start, min(end, config.updates) - start) for (start, name), end in zip(begun.items(), ends, strict=True)
    ]
    return [span for span in spans if span[2] > 0]


def _networks(dry: DryRun, asleep: float, active: float) -> dict[str, Network]:
    """The operations for an image while the discriminator is `asleep`, and with all that is `active` at the end."""
    training = dry.training
    autoencoder, teacher = training.autoencoder, training.autoencoding.teacher
    lpips = training.objective.lpips if training.autoencoding.decodes else None
    perceptual = 0 if lpips is None else dry.perceptual_flops(1)
    found = {
        "autoencoder": _network([autoencoder], asleep - perceptual),
        "encoder": _network([autoencoder.encoder, autoencoder.quant_conv]),
        "decoder": _network([autoencoder.post_quant_conv, autoencoder.decoder]),
    }
    if teacher is not None:
        found["teacher"] = _network([teacher.model])
    if training.discriminator is not None:
        found["discriminator"] = _network([training.discriminator], active - asleep)
    return found if lpips is None else found | {"LPIPS": _network([lpips], perceptual)}


def _network(parts: list[nn.Module], flops: float | None = None) -> Network:
    parameters = [parameter for part in parts for parameter in part.parameters()]
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Network(sum(parameter.numel() for parameter in parameters), learning, flops)


def _disk(config: TrainConfig, dry: DryRun) -> Disk:
    """As a run checks it when it begins."""
    folder, checkpoint = folder_of(config), checkpoint_bytes(dry.training)
    best = Best(folder, config.best_metric).bytes_still_needed(dry.training)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Disk(checkpoint, (KEPT + 1) * checkpoint + best, shutil.disk_usage(there).free)
