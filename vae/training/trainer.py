"""The Lightning Trainer of a configuration, or one line that says why it cannot be built."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from vae.config.schema import TrainConfig
from vae.console import warn
from vae.distributed import sensible_threads
from vae.errors import InputError, require
from vae.training.callbacks import Advice, Curves, Pictures, SkippedImages
from vae.training.checkpointing import Best, CheckedCheckpointIO, Checkpoints
from vae.training.interruption import StopRequests, keep_lightning_out
from vae.training.loggers import build_loggers
from vae.training.terminal import Progress

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")
COUNTS = ("accumulate_grad_batches", "log_every_n_steps", "num_nodes")
OWNED = {  # {argument of lightning.Trainer: the config key that it follows from}
    "max_steps": "updates",
    "max_epochs": "updates",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "logger": "logger",
    "gradient_clip_val": "optim.gradient_clip",
    "gradient_clip_algorithm": "optim.gradient_clip",
    "callbacks": "the key that asks for it",
    "plugins": "trainer.precision or trainer.strategy",
    "max_time": "max_minutes",
    "default_root_dir": "output",
    "use_distributed_sampler": "nothing: the data order is ours",
    "sync_batchnorm": "loss.discriminator.norm",
    "enable_model_summary": "nothing",
    "enable_checkpointing": "nothing: a run always has checkpoints",
    "limit_train_batches": "updates",
    "limit_val_batches": "data.validation_images",
    "fast_dev_run": "updates",
    "overfit_batches": "data.root",
    "barebones": "nothing: a run always has checkpoints",
    "min_steps": "updates",
    "min_epochs": "updates",
    "reload_dataloaders_every_n_epochs": "nothing: the data have no end",
    "inference_mode": "nothing: validation is without gradients",
    "num_sanity_val_steps": "nothing: validation runs once before training",
}


def build_trainer(
    config: TrainConfig, folder: Path, requests: StopRequests, skipped: SkippedImages, best: Best
) -> lightning.Trainer:
    """Return a Trainer that counts in updates, writes only below `folder`, and leaves the data order alone.

    Raises InputError if Lightning refuses the arguments, or if they need another device.
    """
    arguments: dict[str, Any] = {"devices": 1, "log_every_n_steps": 10} | config.trainer
    check_arguments(arguments)
    arguments["strategy"] = _strategy(arguments, config.timeout_minutes)
    silence_lightning()

    accumulate = arguments.get("accumulate_grad_batches", 1)
    has_batch_norm = bool(config.loss.weights.adversarial) and config.loss.discriminator.mixes_images

    every = arguments["log_every_n_steps"]
    progress = Progress(best, every, has_bar=arguments.pop("enable_progress_bar", True))
    checkpoints = Checkpoints(best, config.validate_every, config.checkpoint_minutes, requests)
    try:
        trainer = lightning.Trainer(
            **arguments,
            default_root_dir=folder,
            enable_model_summary=False,
            enable_progress_bar=False,  # ours says more, and speaks in a log file too
            max_steps=config.updates,
            max_epochs=-1,
            limit_train_batches=config.updates * accumulate,
            val_check_interval=min(config.validate_every, config.updates) * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,  # our own callback writes checkpoints
            use_distributed_sampler=False,
            inference_mode=False,  # metrics are used again by the next validation, which inference tensors forbid
            sync_batchnorm=has_batch_norm,
            logger=build_loggers(config, folder, lambda: trainer.global_step),
            callbacks=[checkpoints, skipped, Pictures(folder), best, Advice(every), Curves(folder, every), progress],
            plugins=[CheckedCheckpointIO()],
        )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"trainer={config.trainer}: {' '.join(str(error).split())}") from error

    keep_lightning_out(trainer)

    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and arguments.get("precision") == "16-mixed":
        raise InputError(
            "trainer.precision='16-mixed' needs a GPU (on a CPU it would silently be bfloat16); "
            "choose 'bf16-mixed' or '32-true'"
        )
    if on_cpu and has_batch_norm and trainer.world_size > 1:
        raise InputError("loss.discriminator.norm='batch' over several CPU processes; choose 'group' or use GPUs")
    return trainer


@contextmanager
def cpu_threads(config: TrainConfig, *, is_new: bool) -> Iterator[TrainConfig]:
    """Compute with `config.threads` threads within the block, and yield the config with their number.

    A new run of one process on a CPU measures how many are sensible, if `config` states none. Elsewhere torch's number
    is taken. It is restored at the end.
    """
    before = torch.get_num_threads()
    on_cpu = config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    is_alone = config.trainer.get("devices", 1) in (1, "1") and config.trainer.get("num_nodes", 1) == 1
    if config.threads is None and is_new and on_cpu and is_alone:
        config = replace(config, threads=sensible_threads())
        if config.threads != before:
            warn(f"threads={config.threads}, since the {before} that torch would take are slower here just now", "note")

    torch.set_num_threads(config.threads or before)
    try:
        yield config
    finally:
        torch.set_num_threads(before)


def _strategy(arguments: dict[str, Any], timeout_minutes: float) -> str | DDPStrategy:
    """Return the strategy: Lightning's choice for a single process, else DDP.

    In DDP every process runs the module's forward. Buffers are the same on all processes by construction, so they
    are not broadcast. No process waits longer than the timeout.
    """
    is_alone = arguments["devices"] in (1, "1") and arguments.get("num_nodes", 1) == 1
    if is_alone and arguments.get("strategy", "auto") == "auto":
        return "auto"
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes), broadcast_buffers=False, gradient_as_bucket_view=True
    )


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check the arguments of lightning.Trainer in `trainer`. Raises InputError for one that cannot be used."""
    known = set(inspect.signature(lightning.Trainer).parameters) - set(OWNED)
    for name, value in arguments.items():
        if name in OWNED:
            raise InputError(f"trainer.{name}: set {OWNED[name]} instead")
        require(name in known, f"trainer.{name}", f"an argument of lightning.Trainer: {sorted(known)}")
        if name in COUNTS:
            require(isinstance(value, int) and value >= 1, f"trainer.{name}={value!r}", "1 or more")

    precision = arguments.get("precision", "32-true")
    devices = arguments["devices"]
    require(precision in PRECISIONS, f"trainer.precision={precision!r}", f"one of {list(PRECISIONS)}")

    strategy = arguments.get("strategy", "auto")
    enough = f"one of {list(STRATEGIES)}; of the largest preset there are 2.1 GB to share"
    require(strategy in STRATEGIES, f"trainer.strategy={strategy!r}", enough)

    counted = not isinstance(devices, int) or devices >= 1 or devices == -1
    require(counted, f"trainer.devices={devices}", "1 or more, or -1 for all")


def silence_lightning() -> None:
    """Silence Lightning's messages about itself, and about data loaders unlike ours.

    They are not about the user's run.
    """
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    not_ours = (
        ".*treespec.*",
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*logging interval.*",
    )
    for message in (*not_ours, ".*AMP with fp16 is not supported on CPU.*"):  # build_trainer refuses the last itself
        warnings.filterwarnings("ignore", message)
