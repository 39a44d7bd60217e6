"""The best validation of a run: its averaged weights are an export from then on, `exports/best`.

Checkpoints: all that resuming needs, written whole, checked, and in time."""

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
from vae.training.export import EXPORTS, export
from vae.training.interruption import StopRequests, reason
from vae.training.module import AutoencoderModule
from vae.training.run_dir import HashingFile, checkpoints_in, keep_newest, record, step_name
from vae.weights.loaded import read_json

BEST, RECORD = "best", "best.json"


class Kept(NamedTuple):
    """Which validation it was."""

    updates: int
    metric: str
    value: float

    def __str__(self) -> str:
        return f"update {self.updates}, {self.metric} {self.value:.{METRICS[self.metric].digits}f}"


class Best(Callback):
    """Keeps the best by `metric` of all validations that a run made since its first update; of equal ones the first.

    `best.json` says which, and is written last: a run that is killed before that goes on from a checkpoint older than
    the validation, makes it again and writes the same bytes. So checkpoints need not know of it.
    """

    def __init__(self, run: Path, metric: str | None) -> None:
        self.run, self.metric = run, metric
        self.folder = run / EXPORTS / BEST
        self.kept: Kept | None = None

    def begin(self, *, resumed: bool) -> None:
        """Find what was kept. Another metric's best says nothing of this one's."""
        record = self.folder / RECORD
        if not resumed:
            record.unlink(missing_ok=True)  # of a run that has left nothing else
        elif record.is_file():
            kept = _read(record)
            self.kept = kept if kept.metric == self.metric else None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, AutoencoderModule)
        if self.metric is None or not trainer.is_global_zero or pl_module.updates == 0:
            return
        value = pl_module.validation.measured.get(self.metric, math.nan)
        if is_better(self.metric, value, self.kept):
            export(pl_module, self.run, BEST)
            self.kept = Kept(pl_module.updates, self.metric, value)
            write_text(self.folder / RECORD, json.dumps(self.kept._asdict(), allow_nan=False) + "\n")

    def bytes_still_needed(self, training: AutoencoderModule) -> int:
        """Of disk: for two layouts in float32, one of them in float16 too, and that one again while it is replaced."""
        if self.metric is None:
            return 0
        weights = sum(tensor.nbytes for tensor in training.ema_model.state_dict().values())
        return 4 * weights - sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))


def is_better(metric: str, value: float, kept: Kept | None) -> bool:
    """What is not finite is never better."""
    badness = METRICS[metric].badness
    return math.isfinite(value) and (kept is None or badness(value) < badness(kept.value))


def _read(record: Path) -> Kept:
    try:
        return Kept(**read_json(record))
    except TypeError as error:
        raise InputError(f"{record}: not what this version of vae writes; delete it ({error})") from error


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
        assert isinstance(pl_module, AutoencoderModule)
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
        assert isinstance(pl_module, AutoencoderModule)
        pl_module.is_stepping = False  # not before: Lightning's own count and schedule follow the step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_or_stop(trainer, pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
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
        """The processes' shares of the images may differ by one batch: they agree during those that all have."""
        if self.requests.is_training and batch_idx < self._shared_batches:
            self._save_or_stop(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer, pl_module)
        self.requests.is_training = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """What the last whole update left. The other processes are not waited for: they may be gone."""
        assert isinstance(pl_module, AutoencoderModule)
        if self.requests.is_training and not pl_module.is_stepping and pl_module.is_finite:
            try:
                self._save(trainer, pl_module, wait=False)
            except InputError as unsaved:
                warn(f"error: update {trainer.global_step} is not saved: {unsaved}")

    def _save_or_stop(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save where it is time to; stop where any process was asked to."""
        assert isinstance(pl_module, AutoencoderModule)
        is_time = time.monotonic() - self._saved_at >= 60.0 * self.minutes
        wish = pl_module.process_group.all_reduce_max(self.requests.status or (SAVE if is_time else 0))
        if wish or trainer.global_step % self.every == 0:
            self._save(trainer, pl_module)
        if wish > SAVE:
            raise Stopped(wish, f"{reason(wish)} after update {trainer.global_step}")

    def _save(self, trainer: lightning.Trainer, training: lightning.LightningModule, wait: bool = True) -> None:
        assert isinstance(training, AutoencoderModule)
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


def checkpoint_bytes(training: AutoencoderModule) -> int:
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
