"""What a run leaves behind: checkpoints to resume from, published weights, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vae.checkpoints.safe import replacing
from vae.data.pictures import reconstruction_sheet

KEPT = 2  # checkpoints of a run
PICTURED = 8  # held-out images on every sheet


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all, whatever filesystem the system's temporary folder is on."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)


def step_name(updates: int) -> str:
    return f"step_{updates:07d}"


class Checkpoints(Callback):
    """All that resuming needs, every so many updates and at the end: the newest few, `last.ckpt` pointing at one.

    Saved between two updates only, also when gradients are accumulated.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._saved = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        name = f"{step_name(trainer.global_step)}.ckpt"
        trainer.save_checkpoint(self.folder / name)
        if trainer.is_global_zero:
            with replacing(self.folder / "last.ckpt") as partial:
                partial.symlink_to(name)
            for old in sorted(self.folder.glob("step_*.ckpt"))[:-KEPT]:
                old.unlink()


class Pictures(Callback):
    """At every validation, the same held-out images: input, reconstruction, error, as one PNG."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "reconstructions"
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._pairs = []

    def on_validation_batch_end(  # noqa: PLR0917  (Lightning's signature)
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if sum(len(images) for images, _ in self._pairs) < PICTURED:
            self._pairs.append((batch.images.cpu(), outputs.cpu()))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        images, reconstructions = (torch.cat(parts)[:PICTURED] for parts in zip(*self._pairs, strict=True))
        sheet = reconstruction_sheet(images, {"reconstruction": reconstructions})
        path = self.folder / f"{step_name(trainer.global_step)}.png"
        with replacing(path) as partial:
            sheet.save(partial, format="PNG")
        log_picture(trainer.loggers, sheet, trainer.global_step)


def log_picture(loggers: Sequence[Logger], picture: Image.Image, updates: int) -> None:
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("val/reconstructions", [picture], step=updates)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image("val/reconstructions", TF.pil_to_tensor(picture), updates)
