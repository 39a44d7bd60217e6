"""`skipped.jsonl`: images that could not be used, each once, as they were met; too many of them stop the run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback

from vae.checkpoints.safe import write_text
from vae.data.limits import printable
from vae.data.loading import LeftOut
from vae.training.console import warn
from vae.training.module import Training
from vae.training.stopping import StopRequests

ALWAYS_ALLOWED = 10  # corrupt images, in however small a data set
TOLD_EVERY = 8  # batches: processes tell each other of corrupt images
TRAINING, VALIDATION = "training", "validation"


class LeftOutImages(Callback):
    """Lists what each batch could not use. Process r > 0 has its own list, skipped_r.jsonl.

    `limit` is the share of the training `images` that may be corrupt, over all processes; any number may be only too
    small. What an interrupted run has listed is not listed again, but counts only if it is met again: it may have been
    repaired.
    """

    def __init__(self, run: Path, limit: float, images: int, requests: StopRequests) -> None:
        self.run, self.requests = run, requests
        self.allowed = max(ALWAYS_ALLOWED, limit * images)
        self._file = run / "skipped.jsonl"
        self._known: set[tuple[str, str]] = set()  # (training or validation, name)
        self._corrupt: set[str] = set()  # of all processes
        self._untold: set[str] = set()  # of this one

    def begin(self, rank: int, *, resumed: bool) -> None:
        if rank:
            self._file = self.run / f"skipped_{rank}.jsonl"
        if not resumed:
            self._file.unlink(missing_ok=True)  # of a run that has left nothing else
        elif self._file.is_file():
            rows = list(_rows(self._file))
            write_text(self._file, "".join(f"{json.dumps(row)}\n" for row in rows))  # without a line that a kill cut
            self._known = {(row["of"], row["image"]) for row in rows}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Training)
        self.add(batch.left_out, TRAINING, trainer.global_step)
        if batch_idx % TOLD_EVERY == 0 and pl_module.council.highest(len(self._untold)):
            self._corrupt = self._corrupt.union(*pl_module.council.all_of(self._untold))
            self._untold = set()
        self.requests.has_bad_images = len(self._corrupt) > self.allowed

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.add(batch.left_out, VALIDATION, trainer.global_step)

    def add(self, left_out: Iterable[LeftOut], of: str, updates: int) -> None:
        left_out = list(left_out)
        if of == TRAINING:
            self._untold |= {one.name for one in left_out if one.is_corrupt} - self._corrupt
        new = {one.name: one for one in left_out if (of, one.name) not in self._known}
        if not new:
            return
        if not self._known:
            first = printable(next(iter(new)))
            warn(f"warning: some images are left out; they are listed in {self._file}. The first: {first}")
        self._known |= {(of, name) for name in new}
        with self._file.open("a", encoding="utf-8") as file:
            for one in new.values():
                row = {"image": one.name, "of": of, "corrupt": one.is_corrupt, "reason": one.reason, "updates": updates}
                file.write(f"{json.dumps(row)}\n")


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # a kill cut it
