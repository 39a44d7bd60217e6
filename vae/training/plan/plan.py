"""The plan of a run: what it will need and take, before it is started. `plan` is the entry.

`Sizing` says whether the run fits into its device's memory, and by which overrides it would. `measure_pace` says how
fast this machine makes updates: it makes real ones of random images, as large as a few seconds allow. No image is
opened and nothing is written.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from vae.config.schema import SMALLEST_PERCEPTUAL_IMAGE, TrainConfig
from vae.data.build import open_sources
from vae.errors import InputError
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
    resident_bytes,
    target_of,
)
from vae.training.resume import folder_of
from vae.training.train import build_module
from vae.training.trainer import cpu_threads

MARGIN = 1.1  # as measured on CPUs: for kernels' workspaces, and for memory that an allocator cannot use again


@dataclass(frozen=True)
class Remedy:
    """Overrides by which a run takes less memory, the bytes that it then needs, and whether that fits."""

    overrides: str
    needed: int
    fits: bool


@dataclass(frozen=True)
class Memory:
    """The memory of one process, in bytes.

    `parts` are what lives at the peak, `needed` is their sum with the margin. `available` is a GPU's free memory or the
    process's share of a CPU's. It is None where the device is elsewhere, and so is all that follows from it.
    `largest_batch` is the largest `data.batch_size` that would fit.
    """

    parts: dict[str, int]
    needed: int
    available: int | None
    fits: bool | None
    largest_batch: int | None
    remedies: list[Remedy]


class Sizing:
    """The bytes that a run needs, as a linear function of the images in a batch.

    Two dry runs give the line: one of the batch as it is, and one of a single image (of two where the batch is one).
    `updates` are those done when the run's most expensive update begins.
    """

    def __init__(self, dry: DryRun, updates: int) -> None:
        self.dry = dry
        self.updates = updates
        self.batch = dry.config.data.batch_size
        self.cost = dry.cost(self.batch, updates)
        other = 1 if self.batch > 1 else 2
        self._slope = (self.cost.peak - dry.cost(other, updates).peak) / (self.batch - other)
        self.program = resident_bytes() if dry.target.device == "cpu" else 0

    def needed(self, images: float) -> int:
        """Return the bytes for a batch of so many images of the largest size, with the margin."""
        peak = self.cost.peak + self._slope * (images - self.batch)
        return round(MARGIN * (peak + self.program))

    def for_size(self, images: int, size: Size) -> int:
        """Return the bytes for a batch of `images` of another `size`, (height, width) in pixels."""
        height, width = largest_size(self.dry.config)
        return self.needed(images * size[0] * size[1] / (height * width))

    def largest(self, available: int) -> int:
        """Return the number of images in the largest batch that fits, 0 where not even one does."""
        return max(0, int((available - self.needed(0)) / (MARGIN * self._slope)))

    def memory(self, available: int | None) -> Memory:
        """Return what the run needs, set against `available` bytes. Remedies are looked for where it does not fit."""
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
        """Yield remedies, each by itself, the one that changes least first."""
        config, target = self.dry.config, self.dry.target

        def remedy(overrides: str, config: TrainConfig, target: Target = target) -> Remedy:
            cost = DryRun(config, target).cost(config.data.batch_size, self.updates)
            needed = round(MARGIN * (cost.peak + self.program))
            return Remedy(overrides, needed, needed <= available)

        if not config.gradient_checkpointing:
            yield remedy("gradient_checkpointing=true", replace(config, gradient_checkpointing=True))

        if self.batch > 1:
            # The batch is divided evenly, so that an update has the same images as before.
            kept = round(MARGIN * self.dry.gradients)  # they now live from batch to batch
            most = max(1, self.largest(available - kept))
            batch = max(size for size in range(1, self.batch) if self.batch % size == 0 and size <= most)
            accumulate = target.accumulate * self.batch // batch
            smaller = replace(config, data=replace(config.data, batch_size=batch))
            overrides = f"data.batch_size={batch} trainer.accumulate_grad_batches={accumulate}"
            yield remedy(overrides, smaller, replace(target, accumulate=accumulate))

        if target.precision == "32-true":
            yield remedy("trainer.precision=bf16-mixed", config, replace(target, precision="bf16-mixed"))


SECONDS = 8.0  # once they are spent, no larger update is tried
TIMED = 3  # repetitions, of which the fastest counts, since other programs only make an update slower


@dataclass(frozen=True)
class Pace:
    """The seconds of an update, as a linear function of its operations.

    `per_flop` is for a floating-point operation of forward and backward. `per_batch` is for each batch besides, to walk
    through the weights. `per_step` is for the optimiser and the EMA. They follow from the two largest updates that were
    made; the largest had so many `images` of `size`, and the slowest of its repetitions took longer than the fastest by
    the share `scatter`.
    """

    per_flop: float
    per_batch: float
    per_step: float
    images: int
    size: Size
    scatter: float

    def seconds(self, flops: float, batches: int = 1) -> float:
        """Return the seconds of an update with so many operations in so many batches."""
        return self.per_flop * flops + self.per_batch * batches + self.per_step


@dataclass(frozen=True)
class _Made:
    """A real update of one batch: its operations, and its seconds before (`passing`) and in the step (`stepping`).

    `scatter` is by which share the slowest repetition took longer than the fastest, which counts.
    """

    images: int
    size: Size
    flops: int
    passing: float
    stepping: float
    scatter: float


def measure_pace(
    config: TrainConfig, target: Target, updates: int, can_hold: Callable[[int, Size], bool]
) -> Pace | None:
    """Time real updates, each larger than the one before. Returns None where not even the first fits into memory.

    `updates` are those done, since what an update consists of depends on them. `can_hold(images, size)` says what fits.
    """
    made: list[_Made] = []
    update = None
    start = time.perf_counter()

    for images, size in _growing(config):
        spent = time.perf_counter() - start
        if not can_hold(images, size) or (len(made) > 1 and spent + _expected(made[-1], images, size) > SECONDS):
            break
        update = update or _real_update(config, target)
        made.append(_make(config, update, updates, images, size))

    return _pace(made) if made else None


def _pace(made: list[_Made]) -> Pace:
    """Fit a line through the last two updates.

    It goes through the origin where there is only one, or where a larger update was not slower.
    """
    last = made[-1]
    rise = last.passing - made[-2].passing if len(made) > 1 else 0.0
    per_flop = rise / (last.flops - made[-2].flops) if rise > 0 else 0.0

    # Noise can make the slope or the rest negative. The line then goes through the origin.
    if not 0 < per_flop * last.flops <= last.passing:
        per_flop = last.passing / last.flops
    return Pace(per_flop, last.passing - per_flop * last.flops, last.stepping, last.images, last.size, last.scatter)


def _expected(last: _Made, images: int, size: Size) -> float:
    """Return the seconds that measuring an update of this size would take, from the last one."""
    growth = images * size[0] * size[1] / (last.images * last.size[0] * last.size[1])
    return (1 + TIMED) * (growth * last.passing + last.stepping)


def _growing(config: TrainConfig) -> Iterator[tuple[int, Size]]:
    """Yield the (images, size) of ever larger updates.

    First one image, whose sides grow by half up to the largest size; then more images, up to the batch.
    """
    largest = largest_size(config)
    factor = config.model.downsample_factor
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
    """Return an update of a module with real weights on the target's device."""
    training = build_module(replace(config, compile=False)).to(target.device)
    training.objective.to(torch.device(target.device))
    training.autoencoding.teacher = teacher_of(config)
    training.autoencoding.to(torch.device(target.device))
    return Update(training, target)


def _make(config: TrainConfig, update: Update, updates: int, images: int, size: Size) -> _Made:
    """Make updates of one size, and time the fastest.

    The first one warms up, and its operations are counted.
    """
    batch = random_batch(config, images, size, update.target.device)
    with Meter() as meter:
        update.backward(update.forward(batch, updates))
    update.step()

    passing = stepping = math.inf
    slowest = 0.0
    for _ in range(TIMED):
        began = _now(update.target.device)
        update.backward(update.forward(batch, updates))
        between = _now(update.target.device)
        update.step()
        passing = min(passing, between - began)
        slowest = max(slowest, between - began)
        stepping = min(stepping, _now(update.target.device) - between)

    return _Made(images, size, meter.flops, passing, stepping, slowest / passing - 1)


def _now(device: str) -> float:
    """Return the time in seconds, once everything that the device was asked to do is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def with_fitting_batch(config: TrainConfig) -> TrainConfig:
    """Return `config` with as many images in a batch as fit, and with gradients accumulated over the rest of an update.

    The images of an update stay the same in number. The batch is the largest that divides them, that the plan lets in,
    and of which one real update can be made. Raises InputError where not even one image fits, or there is no device.
    """
    target = target_of(config)
    available = available_to(target)
    if available is None or target.processes > 1:  # each process would choose by itself
        raise InputError("data.batch_size=auto without one device, here: expected a number, which vae plan proposes")

    whole = checked(config, target)
    images = config.data.batch_size * target.accumulate
    *_, (_, start, _) = _spans(whole)
    for batch in (size for size in range(images, 0, -1) if images % size == 0):
        smaller = _in_batches(whole, batch, images)
        aim = replace(target, accumulate=images // batch)
        if Sizing(DryRun(smaller, aim), start).needed(batch) <= available and _is_made(smaller, aim, start):
            return replace(_in_batches(config, batch, images), auto_batch_size=False)
    raise InputError("data.batch_size=auto: not even one image of an update fits into memory; vae plan has remedies")


def _in_batches(config: TrainConfig, batch: int, images: int) -> TrainConfig:
    """Return `config` with `images` an update, so many in a batch."""
    accumulate = {"accumulate_grad_batches": images // batch}
    return replace(config, data=replace(config.data, batch_size=batch), trainer=config.trainer | accumulate)


def _is_made(config: TrainConfig, target: Target, updates: int) -> bool:
    """Return whether a real update of a whole batch can be made, without running out of the GPU's memory."""
    try:
        _make(config, _real_update(config, target), updates, config.data.batch_size, largest_size(config))
        return True
    except torch.OutOfMemoryError:
        return False


ASLEEP = -1  # a number of updates before any discriminator starts
RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class Network:
    """A network's parameters, how many of them learn, and its operations for each training image.

    `flops` are those with all terms active, forward and backward. None where they are counted with the whole network.
    """

    parameters: int
    learning: int
    flops: float | None


@dataclass(frozen=True)
class Phase:
    """Updates that consist of the same work: the operations of one, on all processes, and its seconds."""

    name: str
    updates: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes.

    `checkpoint` is one checkpoint's. `needed` is that of all checkpoints and the best export while they are written.
    `available` is what is free.
    """

    checkpoint: int
    needed: int
    available: int


@dataclass(frozen=True)
class Plan:
    """What a run will need and take.

    `pace` is what the seconds are predicted from. It is None where the device is elsewhere, and so are the seconds.
    `epochs` is None where images are not counted. `reduced` are the bytes of gradients that each process exchanges in
    an update. `notes` say what the numbers do not contain.
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
        """Hours of all updates, without validations, or None where the pace is unknown."""
        seconds = [None if one.seconds is None else one.updates * one.seconds for one in self.phases]
        return None if None in seconds else sum(filter(None, seconds)) / 3600


def plan(config: TrainConfig) -> Plan:
    """Follow an update of `config` on tensors without contents, and make some small real ones if its device is here.

    Raises InputError for what a run would refuse, except for its images and for devices that are elsewhere.
    """
    target = target_of(config)
    config = checked(config, target)

    *earlier, (name, start, updates) = _spans(config)
    dry = DryRun(config, target)
    batch = config.data.batch_size
    sizing = Sizing(dry, start)
    available = available_to(target)

    pace = None
    if available is not None:
        with cpu_threads(config, is_new=True) as config:
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
    """Return (name, first update, number of updates) of each part of the run."""
    loss = config.loss
    begun = {0: RECONSTRUCTION}
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
    """Return the networks by name.

    `asleep` are an image's operations before the discriminator starts, `active` those with all terms, at the end.
    """
    training = dry.training
    autoencoder = training.autoencoder
    teacher = training.autoencoding.teacher
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
    """Return the parameters of some modules together, with the operations that the caller has counted."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Network(sum(parameter.numel() for parameter in parameters), learning, flops)


def _disk(config: TrainConfig, dry: DryRun) -> Disk:
    """Return the disk space that a run checks for when it begins."""
    folder, checkpoint = folder_of(config), checkpoint_bytes(dry.training)
    best = Best(folder, config.best_metric).bytes_still_needed(dry.training)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Disk(checkpoint, (KEPT + 1) * checkpoint + best, shutil.disk_usage(there).free)
