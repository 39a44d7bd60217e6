"""Where the logged values of a run go: metrics.csv always, TensorBoard or Weights & Biases if they are asked for.

All of them count in updates. Lightning counts steps from 0 and validations apart, so what it passes as the step is
ignored, and a clock is asked for the updates done.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from vae.config.fields import flat
from vae.config.schema import TrainConfig
from vae.files import replacing
from vae.run_dir import RunDir

Clock = Callable[[], int]
CLOCK = "updates"


class MetricsFile(Logger):
    """Write metrics.csv: one row for each update at which something was logged.

    Rows are appended, and the file is rewritten at once if a column is new. So it is readable after a kill, and a
    resumed run continues it. `clock` returns the updates done.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__()
        self.path = path
        self._clock = clock
        self._rows: dict[int, dict[str, Any]] = {}
        self._columns: list[str] = []
        self._written: set[int] = set()

        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self._rows[int(row[CLOCK])] = {name: value for name, value in row.items() if value}

    @property
    def name(self) -> str:
        """Lightning wants a name; the file has none besides its path."""
        return ""

    @property
    def version(self) -> str:
        """Lightning wants a version; the file has none."""
        return ""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Do nothing: the configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of the current update. The step that Lightning passes is ignored: `clock` counts."""
        updates = self._clock()
        if updates in self._written:
            self._columns = []  # the file has this row without the new values, so it is rewritten

        row = self._rows.setdefault(updates, {CLOCK: updates})
        row |= _without_epoch(metrics)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows in order, also those that are not in the file yet."""
        return [self._rows[updates] for updates in sorted(self._rows)]

    def resume_at(self, updates: int) -> None:
        """Forget the rows after `updates`: the resumed run makes these updates again."""
        self._rows = {done: row for done, row in self._rows.items() if done <= updates}

    @rank_zero_only
    def save(self) -> None:
        """Append the rows that are complete: all but the newest, to which a validation may still add."""
        self._write(sorted(self._rows)[:-1])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all rows: the run is over."""
        self._write(sorted(self._rows))

    def _write(self, complete: list[int]) -> None:
        """Write the rows of the `complete` updates that the file does not have yet."""
        columns = [CLOCK, *sorted({name for done in complete for name in self._rows[done]} - {CLOCK})]
        fresh = [done for done in complete if done not in self._written]

        if columns != self._columns:  # a new term, or the start of a session: rewrite the whole file
            with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self._rows[done] for done in complete)
            self._columns = columns
            self._written = set(complete)
        elif fresh:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(self._rows[done] for done in fresh)
            self._written |= set(fresh)


@runtime_checkable
class ShowsPictures(Protocol):
    """A logger that can show pictures."""

    def log_picture(self, name: str, picture: Image.Image) -> None:
        """Show a picture of the current update."""
        ...


class TensorBoard(TensorBoardLogger):
    """Write event files for TensorBoard into the run's directory, at the same steps as metrics.csv."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder, name="tensorboard", version="", default_hp_metric=False)
        self._clock = clock

    def resume_at(self, updates: int) -> None:
        """Have TensorBoard forget what lies after `updates`: the resumed run makes these updates again."""
        self._kwargs["purge_step"] = updates + 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write values at the current update."""
        super().log_metrics(_without_epoch(metrics), self._clock())

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image) -> None:
        """Write a picture at the current update."""
        self.experiment.add_image(name, np.asarray(picture), self._clock(), dataformats="HWC")


class WeightsAndBiases(WandbLogger):
    """Send values to Weights & Biases at the same steps as metrics.csv, or keep them in the run's directory.

    Without a key it works offline, so it never asks for a login. A run that is resumed goes on in the same run there.
    """

    def __init__(self, config: TrainConfig, folder: Path, clock: Clock) -> None:
        import wandb

        has_key = wandb.login(prompt=False, verify=False)
        super().__init__(
            folder.name,
            folder,
            id=_begun_in(folder),
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            tags=config.wandb.tags or None,
            notes=config.wandb.notes or config.about or None,
            settings=wandb.Settings(init_timeout=30, mode="online" if has_key else "offline"),
        )
        del self._wandb_init["anonymous"]  # Lightning passes it, and wandb warns that it has no effect
        self._clock = clock

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Send values at the current update."""
        super().log_metrics(_without_epoch(metrics), self._clock())

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image) -> None:
        """Send a picture at the current update."""
        import wandb

        self.experiment.log({name: wandb.Image(picture), "trainer/global_step": self._clock()})

    @rank_zero_only
    def close(self) -> None:
        """Write what is not written yet, and end the run: another one in this process is its own."""
        if self._experiment is not None:
            self._experiment.finish()


def build_loggers(config: TrainConfig, folder: Path, clock: Clock) -> list[Logger]:
    """Return the loggers of a run in `folder`: metrics.csv, and the one that the configuration names."""
    loggers: list[Logger] = [MetricsFile(RunDir(folder).metrics, clock)]
    if config.logger == "tensorboard":
        loggers.append(TensorBoard(folder, clock))
    if config.logger == "wandb":
        loggers.append(WeightsAndBiases(config, folder, clock))
    return loggers


def hyperparameters(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as the loggers show it: {"optim.learning_rate": 1e-4, ...}, with versions."""
    versions = {"vae": metadata.version("vae"), "torch": str(torch.__version__)}
    return flat(asdict(config)) | {f"version.{name}": version for name, version in versions.items()}


def _without_epoch(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the values without Lightning's epoch, which is always 0: the order of the images has no end."""
    return {name: value for name, value in metrics.items() if name != "epoch"}


def _begun_in(folder: Path) -> str | None:
    """Return the id of the run of Weights & Biases that was begun in `folder`, or None."""
    begun = sorted((folder / "wandb").glob("*run-*-*"), key=lambda path: path.stat().st_mtime)
    return begun[-1].name.rpartition("-")[2] if begun else None
