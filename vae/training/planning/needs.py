"""Whether a run fits into its device's memory, and by which overrides it would."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vae.config import TrainConfig
from vae.training.planning.costs import DryRun
from vae.training.planning.target import Target
from vae.training.planning.update import Size, largest_size
from vae.training.saving import bytes_in

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
            "averages": bytes_in(training.average.state_dict()),
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
