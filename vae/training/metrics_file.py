"""`metrics.csv`: one row for each update at which something was logged."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from vae.checkpoints.safe import replacing

CLOCK = "updates"


class MetricsFile(Logger):
    """Written whole and at once, so a killed run leaves a readable file; a resumed run goes on in it.

    Rows that a resumed run is about to live through again are dropped. `clock` gives the updates done.
    """

    def __init__(self, path: Path, clock: Callable[[], int]) -> None:
        super().__init__()
        self.path, self._clock = path, clock
        self._rows: dict[int, dict[str, Any]] = {}
        self._is_first = True
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self._rows[int(row[CLOCK])] = {name: value for name, value in row.items() if value}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """The configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        updates = self._clock()
        if self._is_first:
            self._rows = {done: row for done, row in self._rows.items() if done < updates}
            self._is_first = False
        row = self._rows.setdefault(updates, {CLOCK: updates})
        row |= {name: value for name, value in metrics.items() if name != "epoch"}

    @rank_zero_only
    def save(self) -> None:
        columns = sorted({name for row in self._rows.values() for name in row} - {CLOCK})
        with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [CLOCK, *columns])
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self._rows.items()))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._rows:
            self.save()
