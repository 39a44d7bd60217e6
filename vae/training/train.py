"""`train`: from a configuration to a finished run in its own directory."""

import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from vae.config.schema import AUTO, TrainConfig
from vae.data.build import open_sources
from vae.data.loader import Batch, TrainingImages, shut_down, training_loader, validation_loader
from vae.data.sampler import BucketOrder, EndlessSampler, Order, order_of, without_bucket
from vae.data.sources import Source, checked
from vae.errors import InputError, require
from vae.files import locked
from vae.training.cached_latents import ImagesWithLatents
from vae.training.callbacks import TRAINING, MetricsFile, SkippedImages
from vae.training.checkpointing import Best
from vae.training.export import export, record_origin
from vae.training.initialise import InitialState, initial_state, load_initial_weights
from vae.training.interruption import StopRequests, reporting_failures
from vae.training.module import AutoencoderModule, images_per_update
from vae.training.resume import RUN_NAME, TIME, folder_of, open_folder, read_progress
from vae.training.terminal import announce, conclude, measuring
from vae.training.trainer import build_trainer

Sources = tuple[Source, Source]  # training, validation


def train(config: TrainConfig, sources: Sources | None = None) -> Path:
    """Run `config` to its last update; returns the run's directory.

    `sources` are training and validation images of your own, in place of those that `config.data` names.

    Refuses what cannot work before weights are built: absent images, a Trainer that cannot be, an unusable directory.
    Raises `Stopped` where the run ends before its last update: by a signal, by the clock, by what is not finite, by the
    loss of a process. What it had learned is in a checkpoint then.
    """
    require(not config.plan, "plan=true", "false to train; vae.training.plan.plan makes plans")
    with StopRequests(config.max_minutes) as requests:
        if sources is None:
            images, held_out = open_sources(config.data)
            apart = images.fingerprint() != held_out.fingerprint()
            require(apart, f"data.root={config.data.root!r}: training and validation", "different images")
        else:
            images, held_out = map(checked, sources)
        folder = folder_of(config)
        start = initial_state(config, folder, images)
        config = start.config
        skipped = SkippedImages(folder, config.data.max_corrupt, len(images), requests)
        best = Best(folder, config.best_metric)
        trainer = build_trainer(config, folder, requests, skipped, best)
        _check_named(config, trainer)
        _check_enough(config, images, held_out, trainer.world_size)
        with (
            locked(folder, "training") if trainer.is_global_zero else nullcontext(),
            reporting_failures(trainer, folder, config.timeout_minutes),
        ):
            _run(start, trainer, (images, held_out), skipped, best)
    return folder


def _run(start: InitialState, trainer: lightning.Trainer, sources: Sources, skipped: SkippedImages, best: Best) -> None:
    started, folder, (images, held_out) = time.monotonic(), best.run, sources
    config = start.config
    together, factor = images_per_update(config, trainer), config.model.downsample_factor
    show = measuring if trainer.is_global_zero else lambda sizes, _: sizes
    order = order_of(images, config.data, config.seed, together, factor, show)
    digest = " ".join((images.fingerprint(), held_out.fingerprint(), order.fingerprint(), *start.fingerprint))
    checkpoint, notes = open_folder(config, folder, is_first=trainer.is_global_zero)
    done = _check_progress(config, trainer, checkpoint, digest) if checkpoint else 0
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    module = load_initial_weights(start, build_module(config))
    module.images_digest = digest
    skipped.begin(trainer.global_rank, resumed=checkpoint is not None)
    if trainer.is_global_zero and isinstance(order, BucketOrder):
        skipped.add(without_bucket(images, order), TRAINING, done)
    batches, validation = _loaders(start, trainer, sources, order, done)
    if trainer.is_global_zero:
        best.begin(resumed=checkpoint is not None)
        record_origin(start, folder, (images, held_out), resumed=checkpoint is not None)
        announce(config, module, folder, (len(images), len(held_out)), done, (*start.notes, *notes))
    for logger in trainer.loggers:
        if checkpoint and isinstance(logger, MetricsFile):
            logger.resume_at(done)
    os.environ[RUN_NAME] = folder.name
    try:
        before = {} if checkpoint else trainer.validate(module, validation, verbose=False)[0]
        trainer.fit(module, batches, validation, ckpt_path=checkpoint, weights_only=True)
        if module.validated_at != trainer.global_step:
            trainer.validate(module, validation, verbose=False)
    except BaseException:
        shut_down(validation)
        raise
    finally:
        os.environ.pop(RUN_NAME, None)
        shut_down(batches)
    if trainer.is_global_zero:
        after = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        shut_down(validation)
        minutes = (time.monotonic() - started) / 60
        pace = f"{trainer.global_step - done} updates in {minutes:.1f} minutes, start-up included"
        conclude(config, export(module, folder), (before, after), best, pace)


def _loaders(
    start: InitialState, trainer: lightning.Trainer, sources: Sources, order: Order, done: int
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """Training batches from update `done` on, and this process's share of the validation images."""
    (images, held_out), config = sources, start.config
    first, channels = done * images_per_update(config, trainer), config.model.in_channels
    sampler = EndlessSampler(order, first, trainer.global_rank, trainer.world_size)
    kind = TrainingImages if start.latents is None else partial(ImagesWithLatents, start.latents)
    batches = training_loader(kind(images, order, config.data, channels, config.seed), sampler)
    return batches, validation_loader(held_out, config.data, channels, trainer.global_rank, trainer.world_size)


def _check_progress(config: TrainConfig, trainer: lightning.Trainer, checkpoint: Path, images: str) -> int:
    """Updates done. The images, and how many make an update, must be as before, or the order of the data would jump."""
    progress, now = read_progress(checkpoint), images_per_update(config, trainer)
    require(
        now == progress.images_per_update,
        f"data.batch_size={config.data.batch_size}, {trainer.world_size} processes and accumulation over "
        f"{trainer.accumulate_grad_batches}: {now} images an update",
        f"a product of {progress.images_per_update}, as the run had",
    )
    more = f"at least the {progress.updates} that are done"
    require(config.updates >= progress.updates, f"updates={config.updates}", more)
    is_known = images == progress.images
    if config.teacher is not None:  # of whose configuration earlier versions noted nothing
        is_known |= images.rpartition(" ")[0] == progress.images
    if not is_known:
        others = {"data.latents": config.data.latents, "teacher": config.teacher}
        given = "".join(f" and {key}={value!r}" for key, value in others.items() if value is not None)
        or_these = " (or what makes latents)" if given else ""
        raise InputError(
            f"data.root={config.data.root!r}{given}: images were added, removed, renamed or changed since the run "
            f"began{or_these}; restore them or start a new run"
        )
    return progress.updates


def _check_named(config: TrainConfig, trainer: lightning.Trainer) -> None:
    """Processes that others start would each put their own time into the name."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    lightnings = environment is None or isinstance(environment, LightningEnvironment)
    needs = trainer.world_size > 1 and not lightnings and config.resume in {None, AUTO}
    require(not needs or TIME not in config.name, f"name={config.name!r}", "a fixed name under torchrun or SLURM")


def _check_enough(config: TrainConfig, training: Source, validation: Source, processes: int) -> None:
    if not len(training):
        given = f"data.root={config.data.root!r}"
        raise InputError(f"{given}: no image is left to train on; add images or set data.validation_root")
    fewest = f"at least one for each of the {processes} processes; raise data.validation_fraction or add images"
    require(len(validation) >= processes, f"{len(validation)} validation images", fewest)


def build_module(config: TrainConfig) -> AutoencoderModule:
    """As a run has it, before weights are loaded."""
    module = AutoencoderModule(config)
    if config.channels_last:
        module.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.ema_model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        for block in module.autoencoder.blocks():
            block.compile(dynamic=False)  # in place: parameter names stay as they are; one shape a block
    return module
