"""What a run says on the terminal: where it stands, how far it is, what it made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from vae.config import TrainConfig
from vae.training.module import Training


class Progress(RichProgressBar):
    """One bar over all updates."""

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.num_training_batches  # also right where gradients are accumulated

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in shown.items() if name != "v_num"}


def announce(config: TrainConfig, training: Training, folder: Path, images: tuple[int, int], done: int) -> None:
    parameters = sum(parameter.numel() for parameter in training.autoencoder.parameters())
    _say(
        f"Autoencoder of {parameters:,} parameters, {images[0]} training and {images[1]} validation images at "
        f"{config.data.resolution} px, updates {done} to {config.updates}; everything goes to {folder}"
    )


def conclude(
    folder: Path, exports: Sequence[Path], metrics: tuple[Mapping[str, float], Mapping[str, float]], pace: str
) -> None:
    before, after = metrics
    table = Table("validation (averaged weights)", "at the start", "at the end")
    for name in sorted(after):
        table.add_row(name, f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}")
    Console().print(table)
    left = {
        "pictures": folder / "reconstructions",
        "metrics": folder / "metrics.csv",
        "diffusers": exports[0],
        "web UIs": exports[1],
    }
    for label, path in left.items():
        _say(f"{label:>10}  {path}")
    _say(pace)


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
