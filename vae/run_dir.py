"""The layout of a run's directory. No other module spells these names."""

from pathlib import Path

FILE_ENDING = ".vae.safetensors"  # of an export's single file


def step_name(updates: int) -> str:
    """Return the name of a checkpoint, an export or a picture that was made after so many updates."""
    return f"step_{updates:07d}"


class RunDir:
    """The paths of one run. The class makes no folder and opens no file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def config(self) -> Path:
        """The resolved configuration of the run."""
        return self.path / "config.json"

    @property
    def origin(self) -> Path:
        """What only the beginning of the run knows: how many images there were, and which weights it began from."""
        return self.path / "origin.json"

    @property
    def metrics(self) -> Path:
        """A table with one row for each update at which something was logged."""
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        """A page with the curves of everything in that table."""
        return self.path / "curves.html"

    @property
    def skipped(self) -> Path:
        """The images that could not be used, and why."""
        return self.path / "skipped.jsonl"

    @property
    def pictures(self) -> Path:
        """Folder of reconstructions: the same held-out images at every validation."""
        return self.path / "reconstructions"

    @property
    def checkpoints(self) -> Path:
        """Folder of the newest states to resume from, with their checksums."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Folder of published weights, with one folder for each export."""
        return self.path / "exports"

    @property
    def best(self) -> Path:
        """The export of the best validation."""
        return self.export("best")

    @property
    def best_record(self) -> Path:
        """A record of which validation was the best. It is written last."""
        return self.best / "best.json"

    @property
    def evaluations(self) -> Path:
        """Folder of comparisons between exports and the weights that the run began from."""
        return self.path / "evaluations"

    def export(self, name: str) -> Path:
        """Return the folder of one export. `name` is "best", or "step_" and the update it was made at."""
        return self.exports / name

    def weights_file(self, name: str) -> Path:
        """Return the path of the single weights file in the export `name`, which is named after the run."""
        return self.export(name) / f"{self.path.name}{FILE_ENDING}"

    def exported(self) -> list[Path]:
        """List the exports that exist: the best one first, then those by step with the newest last."""
        return [*self.exports.glob("best"), *sorted(self.exports.glob("step_*"))]

    def published(self) -> Path | None:
        """Return the export that the run's name means: the best one where there is one, else the newest, else None."""
        return self.best if self.best_record.is_file() else next(reversed(self.exported()), None)

    @staticmethod
    def owning(path: str | Path) -> "RunDir | None":
        """Return the run that `path` is, or that it is an export of, or None for any other path."""
        path = Path(path).expanduser().absolute()
        runs = (RunDir.of_export(folder) for folder in (path / "exports" / "any", path, *path.parents))
        return next((run for run in runs if run is not None and run.config.is_file() and run.exports.is_dir()), None)

    @staticmethod
    def of_export(export: Path) -> "RunDir | None":
        """Return the run that the folder `export` in `exports/` belongs to, or None for any other folder."""
        return RunDir(export.parents[1]) if export.parent.name == "exports" else None
