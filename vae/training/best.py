"""The best validation of a run: its averaged weights are an export from then on, `exports/best`."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import lightning
from lightning.pytorch import Callback

from vae.checkpoints.metadata import read_json
from vae.checkpoints.safe import write_text
from vae.errors import InputError
from vae.metrics.registry import METRICS
from vae.training.export import EXPORTS, export
from vae.training.module import Training

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
        assert isinstance(pl_module, Training)
        if self.metric is None or not trainer.is_global_zero or pl_module.updates == 0:
            return
        value = pl_module.validation.measured.get(self.metric, math.nan)
        if is_better(self.metric, value, self.kept):
            export(pl_module, self.run, BEST)
            self.kept = Kept(pl_module.updates, self.metric, value)
            write_text(self.folder / RECORD, json.dumps(self.kept._asdict(), allow_nan=False) + "\n")

    def bytes_still_needed(self, training: Training) -> int:
        """Of disk: for two layouts in float32, one of them in float16 too, and that one again while it is replaced."""
        if self.metric is None:
            return 0
        weights = sum(tensor.nbytes for tensor in training.average.state_dict().values())
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
