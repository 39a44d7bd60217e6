"""Checkpoints and the best export of a run: when they are written, and that they are whole.

A checkpoint holds all that resuming needs. It is written between two updates, checked with its SHA-256 when it is
read, and never holds weights that are not finite. `exports/best` holds the EMA weights of the best validation so
far.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from vae.console import warn
from vae.errors import NOT_FINITE, InputError, Stopped
from vae.files import check_space, replacing, write_text
from vae.metrics.registry import METRICS
from vae.run_dir import RunDir, step_name
from vae.training.export import export
from vae.training.interruption import StopRequests, reason
from vae.training.manifest import HashingFile, checkpoints_in, keep_newest, record
from vae.training.module import AutoencoderModule
from vae.weights.loaded import read_json


class Kept(NamedTuple):
    """Which validation was the best: its update, the metric, and its value."""

    updates: int
    metric: str
    value: float

    def __str__(self) -> str:
        return f"update {self.updates}, {self.metric} {self.value:.{METRICS[self.metric].digits}f}"


class Best(Callback):
    """Export the EMA weights of the best validation since the first update, by `metric`; of equal ones the first.

    `best.json` says which validation it was, and is written last. A run that is killed before that resumes from a
    checkpoint older than the validation, makes it again and writes the same bytes. So checkpoints need not contain
    it.
    """

    def __init__(self, run: Path, metric: str | None) -> None:
        self.run = run
        self.metric = metric
        self.folder = RunDir(run).best
        self.kept: Kept | None = None

    def begin(self, *, resumed: bool) -> None:
        """Read which validation was the best so far. If that was by another metric, it does not count."""
        record = RunDir(self.run).best_record
        if not resumed:
            record.unlink(missing_ok=True)  # from a run that has left nothing else
        elif record.is_file():
            kept = _read(record)
            self.kept = kept if kept.metric == self.metric else None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Export the EMA weights and write `best.json` if this validation is the best so far."""
        assert isinstance(pl_module, AutoencoderModule)
        if self.metric is None or not trainer.is_global_zero or pl_module.updates == 0:
            return

        value = pl_module.validation.measured.get(self.metric, math.nan)
        if is_better(self.metric, value, self.kept):
            export(pl_module, self.run, self.folder.name)
            self.kept = Kept(pl_module.updates, self.metric, value)
            write_text(RunDir(self.run).best_record, json.dumps(self.kept._asdict(), allow_nan=False) + "\n")

    def bytes_still_needed(self, training: AutoencoderModule) -> int:
        """Return the disk space in bytes that the best export may still need.

        It has two layouts in float32, one of them in float16 too, and that one exists twice while it is replaced.
        """
        if self.metric is None:
            return 0
        weights = sum(tensor.nbytes for tensor in training.ema_model.state_dict().values())
        return 4 * weights - sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))


def is_better(metric: str, value: float, kept: Kept | None) -> bool:
    """Return whether `value` is better than the kept one. A value that is not finite is never better."""
    badness = METRICS[metric].badness
    return math.isfinite(value) and (kept is None or badness(value) < badness(kept.value))


def _read(record: Path) -> Kept:
    """Read `best.json`. Raises InputError if it has other keys."""
    try:
        return Kept(**read_json(record))
    except TypeError as error:
        raise InputError(f"{record}: not what this version of vae writes; delete it ({error})") from error


KEPT = 2  # checkpoints that a run keeps
SAVE = 1  # the wish to save: below any exit status, which also asks to stop


class CheckedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints that appear whole or not at all, with their entry in the manifest.

    The temporary file is in the folder of the checkpoint, so on the same filesystem.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write `checkpoint` to `path`, and its SHA-256 to the manifest.

        Raises InputError if the disk has too little space.
        """
        path = Path(path)

        check_space(path.parent, bytes_in(checkpoint), path)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                hashing = HashingFile(file)
                try:
                    torch.save(checkpoint, cast(IO[bytes], hashing))
                except RuntimeError as error:
                    raise hashing.error or error from None
            record(path.parent, path.name, hashing.hexdigest())


class Checkpoints(Callback):
    """Keep the newest few checkpoints, always between two updates.

    One is written every `every` updates, every `minutes`, at the end, when the run is asked to stop, and when it
    fails. Weights that are not finite are never written.
    """

    def __init__(self, best: Best, every: int, minutes: float, requests: StopRequests) -> None:
        self.best = best
        self.every = every
        self.minutes = minutes
        self.requests = requests
        self.folder = RunDir(best.run).checkpoints
        self._saved, self._saved_at, self._shared_batches = 0, 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check that the disk has space for all checkpoints and the best export, and start the clock."""
        assert isinstance(pl_module, AutoencoderModule)
        self._saved = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in checkpoints_in(self.folder))
            needed = (KEPT + 1) * checkpoint_bytes(pl_module) - there
            check_space(self.folder, needed + self.best.bytes_still_needed(pl_module), self.folder)

        # From here on a signal is answered between two updates, when there is something to save.
        self.requests.is_training = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save or stop after the last micro-batch of an update."""
        assert isinstance(pl_module, AutoencoderModule)
        pl_module.is_stepping = False  # not before: Lightning's own count and schedule follow the step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_or_stop(trainer, pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Agree on the number of validation batches that all processes have."""
        assert isinstance(pl_module, AutoencoderModule)
        self._shared_batches = -pl_module.process_group.all_reduce_max(-int(trainer.num_val_batches[0]))

    def on_validation_batch_end(  # noqa: PLR0917  (Lightning's signature)
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save or stop during a validation too.

        The shares of the processes may differ by one batch, so they agree only during those batches that all have.
        """
        if self.requests.is_training and batch_idx < self._shared_batches:
            self._save_or_stop(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last update."""
        self._save(trainer, pl_module)
        self.requests.is_training = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last whole update.

        The other processes are not waited for: they may be gone.
        """
        assert isinstance(pl_module, AutoencoderModule)
        if self.requests.is_training and not pl_module.is_stepping and pl_module.is_finite:
            try:
                self._save(trainer, pl_module, wait=False)
            except InputError as unsaved:
                warn(f"update {trainer.global_step} is not saved: {unsaved}", "error")

    def _save_or_stop(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if it is time to. Raises `Stopped` on all processes if any of them was asked to stop."""
        assert isinstance(pl_module, AutoencoderModule)
        is_time = time.monotonic() - self._saved_at >= 60.0 * self.minutes

        # Clocks and signals differ between processes, so they agree on the strongest wish.
        wish = pl_module.process_group.all_reduce_max(self.requests.status or (SAVE if is_time else 0))
        if wish or trainer.global_step % self.every == 0:
            self._save(trainer, pl_module)

        if wish > SAVE:
            raise Stopped(wish, f"{reason(wish)} after update {trainer.global_step}")

    def _save(self, trainer: lightning.Trainer, training: lightning.LightningModule, wait: bool = True) -> None:
        """Write a checkpoint unless this update has one. Raises `Stopped` if the weights are not finite.

        With `wait` all processes wait until it is written.
        """
        assert isinstance(training, AutoencoderModule)
        if trainer.global_step == self._saved:
            return

        if not training.is_finite:
            raise Stopped(NOT_FINITE, f"weights are not finite after update {trainer.global_step}: not saved")

        self._saved = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            # Lightning's `save_checkpoint` ends in a barrier, which would wait for processes that may be gone.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(checkpoint, self.folder / f"{step_name(trainer.global_step)}.ckpt")
            keep_newest(self.folder, KEPT)
        if wait:
            trainer.strategy.barrier()


def checkpoint_bytes(training: AutoencoderModule) -> int:
    """Return the size of a checkpoint: weights, EMA weights, and the optimiser's two moments of trained weights."""
    trained = sum(parameter.nbytes for parameter in training.parameters() if parameter.requires_grad)
    return bytes_in(training.state_dict()) + 2 * trained


def bytes_in(tree: object) -> int:
    """Return the bytes of all tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(bytes_in(branch) for branch in tree.values())
    return sum(bytes_in(branch) for branch in tree) if isinstance(tree, (list, tuple)) else 0
