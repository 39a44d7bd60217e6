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
from vae.training.stopping import StopRequests

ALWAYS_ALLOWED = 10  # corrupt images, in however small a data set


class LeftOutImages(Callback):
    """Lists what each batch could not use. Process r > 0 has its own list, skipped_r.jsonl.

    `limit` is the share of the training `images` that may be corrupt; any number may be only too small.
    """

    def __init__(self, run: Path, limit: float, images: int, requests: StopRequests) -> None:
        self.run, self.requests = run, requests
        self.allowed = max(ALWAYS_ALLOWED, limit * images)
        self._file = run / "skipped.jsonl"
        self._known: set[str] = set()
        self._corrupt: set[str] = set()

    def begin(self, rank: int) -> None:
        """Go on with what an interrupted run has listed."""
        if rank:
            self._file = self.run / f"skipped_{rank}.jsonl"
        if self._file.is_file():
            rows = list(_rows(self._file))
            write_text(self._file, "".join(f"{json.dumps(row)}\n" for row in rows))  # without a line that a kill cut
            self._known = {row["image"] for row in rows}
            self._corrupt = {row["image"] for row in rows if row["corrupt"] and row["of"] == "training"}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.add(batch.left_out, "training", trainer.global_step)
        self.requests.has_bad_images = len(self._corrupt) > self.allowed

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.add(batch.left_out, "validation", trainer.global_step)

    def add(self, left_out: Iterable[LeftOut], of: str, updates: int) -> None:
        new = {one.name: one for one in left_out if one.name not in self._known}
        if not new:
            return
        if not self._known:
            first = printable(next(iter(new)))
            warn(f"warning: some images are left out; they are listed in {self._file}. The first: {first}")
        self._known |= new.keys()
        if of == "training":
            self._corrupt |= {one.name for one in new.values() if one.is_corrupt}
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
