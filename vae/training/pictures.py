"""At every validation, a picture of what the model does to the same held-out images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vae.checkpoints.safe import replacing
from vae.data.pictures import reconstruction_sheet
from vae.data.pixels import as_depth
from vae.training.manifest import step_name

PICTURED = 8  # held-out images on every sheet


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
        if outputs is not None and sum(len(images) for images, _ in self._pairs) < PICTURED:
            self._pairs.append((as_depth(batch.images.cpu(), 8), outputs.cpu()))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero or not self._pairs:
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
