"""Updates in images and in Lightning's batches."""

from typing import Any

import lightning

from vae.config import TrainConfig


def images_per_update(config: TrainConfig, trainer: lightning.Trainer) -> int:
    """Over all processes and accumulated batches."""
    return config.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def count_from_updates(checkpoint: dict[str, Any], accumulate: int, validate_every: int) -> None:
    """Lightning's counts in a checkpoint, as they follow from the updates that are done.

    Also where a run failed between two updates, or accumulated over another number of batches.

    A checkpoint is written before its update's validation, so where one was due Lightning is told that it was begun and
    not ended: it is made, or made again. The loggers' clock moves by one on restart, and by one at that validation.
    """
    updates = checkpoint["global_step"]
    batches = updates * accumulate
    is_due = updates % validate_every == 0
    loop = checkpoint["loops"]["fit_loop"]
    for part in ("current", "total"):
        counts = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
        loop["epoch_loop.batch_progress"][part].update(counts)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = updates - 1 - is_due
    begun = {"ready": int(is_due), "started": int(is_due), "processed": 0, "completed": 0}
    loop["epoch_loop.val_loop.batch_progress"]["total"].update(begun)
