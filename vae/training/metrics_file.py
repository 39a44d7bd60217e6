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
    """Appended to, and rewritten at once where a column is new: readable after a kill, and a resumed run goes on in it.

    `clock` gives the updates done.
    """

    def __init__(self, path: Path, clock: Callable[[], int]) -> None:
        super().__init__()
        self.path, self._clock = path, clock
        self._rows: dict[int, dict[str, Any]] = {}
        self._columns: list[str] = []
        self._written: set[int] = set()
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
        if updates in self._written:
            self._columns = []  # the file has this row without what comes now
        row = self._rows.setdefault(updates, {CLOCK: updates})
        row |= {name: value for name, value in metrics.items() if name != "epoch"}

    def resume_at(self, updates: int) -> None:
        """Forget the rows after `updates`: they are about to be lived through again."""
        self._rows = {done: row for done, row in self._rows.items() if done <= updates}

    @rank_zero_only
    def save(self) -> None:
        """Append the rows that are complete: all but the newest, to which a validation may still add."""
        self._write(sorted(self._rows)[:-1])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write(sorted(self._rows))

    def _write(self, complete: list[int]) -> None:
        columns = [CLOCK, *sorted({name for done in complete for name in self._rows[done]} - {CLOCK})]
        fresh = [done for done in complete if done not in self._written]
        if columns != self._columns:  # a new term, or the start of a session: the whole file anew
            with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self._rows[done] for done in complete)
            self._columns, self._written = columns, set(complete)
        elif fresh:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(self._rows[done] for done in fresh)
            self._written |= set(fresh)
