"""How fast this machine makes updates: real ones of random images, as large as a few seconds allow."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from vae.config import TrainConfig
from vae.training.fitting import SMALLEST_PERCEPTUAL_IMAGE
from vae.training.planning.costs import Meter
from vae.training.planning.target import Target
from vae.training.planning.update import Size, Update, largest_size, random_batch
from vae.training.run import build_module
from vae.training.start import teacher_of

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
