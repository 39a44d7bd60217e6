"""`train`: from a configuration to a finished run in its own directory."""

import inspect
import json
import logging
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from vae.checkpoints.safe import write_text
from vae.config import TrainConfig
from vae.data.loading import open_sources, training_loader, validation_loader
from vae.data.order import EndlessSampler
from vae.errors import InputError, require
from vae.training.artefacts import AtomicCheckpointIO, Checkpoints, Pictures, export
from vae.training.metrics_file import MetricsFile
from vae.training.module import Training
from vae.training.terminal import Progress, announce, conclude

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OWNED = {  # arguments of lightning.Trainer that follow from ours
    "max_steps": "updates",
    "max_epochs": "updates",
    "val_check_interval": "validate_every",
    "check_val_every_n_epoch": "validate_every",
    "logger": "logger",
    "gradient_clip_val": "optim.gradient_clip",
    "gradient_clip_algorithm": "optim.gradient_clip",
    "callbacks": "the keys that ask for each",
    "default_root_dir": "output",
    "use_distributed_sampler": "nothing: the data order is ours",
    "enable_model_summary": "nothing",
    "enable_checkpointing": "nothing: a run always has checkpoints",
    "limit_train_batches": "updates",
    "inference_mode": "nothing: validation is without gradients",
    "num_sanity_val_steps": "nothing: validation runs once before training",
}


def train(config: TrainConfig) -> Path:
    """Run `config` to its last update; returns the run's directory.

    Refuses what cannot work before weights are built: bad Trainer arguments, absent images, an unusable directory.
    """
    started = time.monotonic()
    _check_trainer(config.trainer)
    training_images, validation_images = open_sources(config.data, config.model.in_channels)
    if not training_images:
        given = f"data.root={config.data.root!r}"
        raise InputError(f"{given}: no image is left to train on; add images or set data.validation_root")
    folder, checkpoint = _prepare_folder(config)
    os.environ["VAE_RUN_NAME"] = config.name  # the processes that Lightning starts compose the configuration anew
    _quieten()
    lightning.seed_everything(config.seed, workers=True, verbose=False)

    module = Training(config)
    if config.channels_last:
        module.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.average.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        for block in module.autoencoder.blocks():
            block.compile()  # in place: parameter names stay as they are

    trainer = _build_trainer(config, folder, module)
    accumulate = trainer.accumulate_grad_batches
    samples_per_update = config.data.batch_size * trainer.world_size * accumulate
    done = _updates_in(checkpoint) if checkpoint else 0
    sampler = EndlessSampler(
        len(training_images), config.seed, done * samples_per_update, trainer.global_rank, trainer.world_size
    )
    batches = training_loader(training_images, config.data, config.seed, sampler)
    held_out = validation_loader(validation_images, config.data, trainer.global_rank, trainer.world_size)

    if trainer.is_global_zero:
        announce(config, module, folder, (len(training_images), len(validation_images)), done)
    before = {} if checkpoint else trainer.validate(module, held_out, verbose=False)[0]
    trainer.fit(module, batches, held_out, ckpt_path=checkpoint, weights_only=True)
    after = trainer.validate(module, held_out, verbose=False)[0]
    if trainer.is_global_zero:
        exports = export(module, folder / "exports", config.name)
        minutes, updates = (time.monotonic() - started) / 60, trainer.global_step - done
        conclude(folder, exports, (before, after), f"{updates} updates in {minutes:.1f} minutes, start-up included")
    return folder


def _quieten() -> None:
    """What Lightning says about itself, or about data loaders unlike ours, is not about the user's run."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for message in (".*treespec.*", ".*does not have many workers.*", ".*dataloader is not resumable.*"):
        warnings.filterwarnings("ignore", message)


def _check_trainer(arguments: dict[str, Any]) -> None:
    known = set(inspect.signature(lightning.Trainer).parameters)
    for name in arguments:
        if name in OWNED:
            raise InputError(f"trainer.{name}: set {OWNED[name]} instead")
        if name not in known:
            raise InputError(
                f"trainer.{name}: not an argument of lightning.Trainer; known are {sorted(known - set(OWNED))}"
            )
    if arguments.get("precision") == "16-mixed" and not torch.cuda.is_available():
        raise InputError(
            f"trainer.precision={arguments['precision']!r} needs a GPU (on a CPU it would silently be bfloat16); "
            f"choose 'bf16-mixed' or '32-true'"
        )
    precision, devices = arguments.get("precision", "32-true"), arguments.get("devices", 1)
    require(precision in PRECISIONS, f"trainer.precision={precision!r}", f"one of {list(PRECISIONS)}")
    require(devices == -1 or not isinstance(devices, int) or devices >= 1, f"trainer.devices={devices}", "1 or more")
    accumulate = arguments.get("accumulate_grad_batches", 1)
    require(accumulate >= 1, f"trainer.accumulate_grad_batches={accumulate}", "1 or more")


def _prepare_folder(config: TrainConfig) -> tuple[Path, Path | None]:
    """(the run's directory, checkpoint to go on from). A directory that holds a run is only touched to resume it."""
    if config.resume is not None:
        folder = Path(config.resume)
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise InputError(f"resume={config.resume!r}: no checkpoints/last.ckpt in it; name the directory of a run")
        return folder, checkpoint
    folder = Path(config.output) / config.name
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if is_first and (folder / "config.json").exists():
        raise InputError(f"name={config.name!r}: {folder} already holds a run; choose another name or resume={folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_first:
            write_text(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output={config.output!r}: cannot write there ({error}); choose another folder") from error
    return folder, None


def _updates_in(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _build_trainer(config: TrainConfig, folder: Path, module: Training) -> lightning.Trainer:
    arguments: dict[str, Any] = {"devices": 1, "log_every_n_steps": 10} | config.trainer
    accumulate = arguments.get("accumulate_grad_batches", 1)
    if config.loss.weights.adversarial and config.loss.discriminator.norm == "batch":
        arguments["sync_batchnorm"] = True
    return lightning.Trainer(
        **arguments,
        default_root_dir=folder,
        enable_model_summary=False,
        max_steps=config.updates,
        max_epochs=-1,
        limit_train_batches=config.updates * accumulate,
        val_check_interval=min(config.validate_every, config.updates) * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # Lightning's; ours is a callback
        use_distributed_sampler=False,
        inference_mode=False,  # metrics live on from one validation to the next; inference tensors could not
        logger=_build_loggers(config, folder, module),
        callbacks=[
            Checkpoints(folder / "checkpoints", config.validate_every),
            Pictures(folder / "reconstructions"),
            *([Progress()] if arguments.get("enable_progress_bar", True) else []),
        ],
        plugins=[AtomicCheckpointIO()],
    )


def _build_loggers(config: TrainConfig, folder: Path, module: Training) -> list[Logger]:
    """Always a CSV file. Weights & Biases runs offline where no key is configured: it never asks for a login."""
    loggers: list[Logger] = [MetricsFile(folder / "metrics.csv", lambda: module.updates)]
    if config.logger == "tensorboard":
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    if config.logger == "wandb":
        import wandb

        has_key = wandb.login(prompt=False, verify=False)
        settings = wandb.Settings(init_timeout=30, mode="online" if has_key else "offline")
        loggers.append(WandbLogger(config.name, folder, project="vae", offline=not has_key, settings=settings))
    return loggers
