"""Checkpoints: all that resuming needs, written whole, checked, and in time."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from vae.checkpoints.safe import check_space, replacing
from vae.errors import NOT_FINITE, InputError, Stopped
from vae.training.best import Best
from vae.training.console import warn
from vae.training.manifest import HashingFile, checkpoints_in, keep_newest, record, step_name
from vae.training.module import Training
from vae.training.stopping import StopRequests, reason

KEPT = 2  # checkpoints of a run
SAVE = 1  # a wish of less weight than any exit status


class CheckedCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all, in their own folder's filesystem, with their entry in the manifest."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
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
    """The newest few, always between two updates: every `every` updates, every `minutes`, at the end, when the run is
    asked to stop, and when it fails. Never weights that are not finite.
    """

    def __init__(self, best: Best, every: int, minutes: float, requests: StopRequests) -> None:
        self.best, self.every, self.minutes, self.requests = best, every, minutes, requests
        self.folder = best.run / "checkpoints"
        self._saved, self._saved_at, self._shared_batches = 0, 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        self._saved, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in checkpoints_in(self.folder))
            needed = (KEPT + 1) * checkpoint_bytes(pl_module) - there
            check_space(self.folder, needed + self.best.bytes_still_needed(pl_module), self.folder)
        self.requests.is_training = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Training)
        pl_module.is_stepping = False  # not before: Lightning's own count and schedule follow the step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._heed(trainer, pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        self._shared_batches = -pl_module.council.highest(-int(trainer.num_val_batches[0]))

    def on_validation_batch_end(  # noqa: PLR0917  (Lightning's signature)
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The processes' shares of the images may differ by one batch: they agree during those that all have."""
        if self.requests.is_training and batch_idx < self._shared_batches:
            self._heed(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer, pl_module)
        self.requests.is_training = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """What the last whole update left. The other processes are not waited for: they may be gone."""
        assert isinstance(pl_module, Training)
        if self.requests.is_training and not pl_module.is_stepping and pl_module.is_finite:
            try:
                self._save(trainer, pl_module, wait=False)
            except InputError as unsaved:
                warn(f"error: update {trainer.global_step} is not saved: {unsaved}")

    def _heed(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save where it is time to; stop where any process was asked to."""
        assert isinstance(pl_module, Training)
        is_time = time.monotonic() - self._saved_at >= 60.0 * self.minutes
        wish = pl_module.council.highest(self.requests.status or (SAVE if is_time else 0))
        if wish or trainer.global_step % self.every == 0:
            self._save(trainer, pl_module)
        if wish > SAVE:
            raise Stopped(wish, f"{reason(wish)} after update {trainer.global_step}")

    def _save(self, trainer: lightning.Trainer, training: lightning.LightningModule, wait: bool = True) -> None:
        assert isinstance(training, Training)
        if trainer.global_step == self._saved:
            return
        if not training.is_finite:
            raise Stopped(NOT_FINITE, f"weights are not finite after update {trainer.global_step}: not saved")
        self._saved, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(checkpoint, self.folder / f"{step_name(trainer.global_step)}.ckpt")
            keep_newest(self.folder, KEPT)
        if wait:
            trainer.strategy.barrier()


def checkpoint_bytes(training: Training) -> int:
    """Of everything saved: weights, averages, and the optimiser's two moments of what is trained."""
    trained = sum(parameter.nbytes for parameter in training.parameters() if parameter.requires_grad)
    return bytes_in(training.state_dict()) + 2 * trained


def bytes_in(tree: object) -> int:
    """Of all tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(bytes_in(branch) for branch in tree.values())
    return sum(bytes_in(branch) for branch in tree) if isinstance(tree, (list, tuple)) else 0
