"""`train`: from a configuration to a finished run in its own directory.

`_train` is the order of a run: the Trainer, the order of the data, the run's directory, the networks, the loaders,
the updates, the export.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from vae.config.schema import AUTO, TrainConfig
from vae.console import track
from vae.data.build import open_sources
from vae.data.loader import Batch, TrainingImages, shut_down, training_loader, validation_loader
from vae.data.sampler import BucketOrder, EndlessSampler, Order, order_of, without_bucket
from vae.data.sources import Files, Source, checked, in_words
from vae.errors import InputError, require
from vae.files import locked
from vae.training.cached_latents import ImagesWithLatents
from vae.training.callbacks import TRAINING, SkippedImages
from vae.training.checkpointing import Best
from vae.training.export import export, record_origin
from vae.training.initialise import InitialState, initial_state, load_initial_weights
from vae.training.interruption import StopRequests, reporting_failures
from vae.training.loggers import MetricsFile, TensorBoard, WeightsAndBiases, hyperparameters
from vae.training.module import AutoencoderModule, images_per_update
from vae.training.resume import RUN_NAME, TIME, as_begun, folder_of, is_resumed, open_folder, read_progress
from vae.training.terminal import Images, announce, conclude, counted, duration
from vae.training.trainer import build_trainer, cpu_threads

Sources = tuple[Source, Source]  # training, validation


class Begun(NamedTuple):
    """Where a run stands when it begins or is resumed: its checkpoint, the updates done, and notes to print."""

    checkpoint: Path | None
    done: int
    notes: Sequence[str]


def train(config: TrainConfig, sources: Sources | None = None) -> Path:
    """Run `config` to its last update and return the run's directory.

    `sources` are training and validation images of your own, in place of those that `config.data` names.

    Raises InputError, before weights are built, for what cannot work: absent images, impossible arguments of the
    Trainer, a directory that cannot be used. Raises `Stopped` if the run ends before its last update: on a signal,
    by the clock, on values that are not finite, or because a process was lost. What it has learned is then in a
    checkpoint.
    """
    unchosen = "a number of data.batch_size; vae.training.plan.plan.with_fitting_batch chooses one"
    require(not config.auto_batch_size, "auto_batch_size=true", unchosen)
    require(not config.plan, "plan=true", "false to train; vae.training.plan.plan makes plans")

    with StopRequests(config.max_minutes) as requests:
        folder = folder_of(config)
        config = as_begun(config, folder)
        opened = _open(config, sources)
        with cpu_threads(config, is_new=not is_resumed(config, folder)) as config_of_run:
            start = initial_state(config_of_run, folder, opened[0])
            _train(start, folder, opened, requests)
    return folder


def build_module(config: TrainConfig) -> AutoencoderModule:
    """Build the Lightning module of a run, before weights are loaded."""
    module = AutoencoderModule(config)
    if config.channels_last:
        module.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.ema_model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    if config.compile:
        for block in module.autoencoder.blocks():
            block.compile(dynamic=False)  # in place: parameter names stay as they are; one shape a block
    return module


def _open(config: TrainConfig, sources: Sources | None) -> Sources:
    """Return the images to train and to validate on. Raises InputError if they are the same."""
    if sources is not None:
        images, held_out = sources
        return checked(images), checked(held_out)

    images, held_out = open_sources(config.data)
    apart = images.fingerprint() != held_out.fingerprint()
    require(apart, f"data.root={config.data.root!r}: training and validation", "different images")
    return images, held_out


def _train(start: InitialState, folder: Path, sources: Sources, requests: StopRequests) -> None:
    """Make the whole run. `start.config` is final: it has the architecture of the weights that the run begins from."""
    started = time.monotonic()
    config = start.config
    skipped = SkippedImages(folder, config.data.max_corrupt, len(sources[0]), requests)
    best = Best(folder, config.best_metric)
    trainer = build_trainer(config, folder, requests, skipped, best)

    _check_named(config, trainer)
    _check_enough(config, *sources, trainer.world_size)

    # One process at a time trains in a folder, and each says how it ended.
    lock = locked(folder, "training") if trainer.is_global_zero else nullcontext()
    with lock, reporting_failures(trainer, folder, config.timeout_minutes):
        order = _order(config, trainer, sources[0])
        digest = " ".join((*(each.fingerprint() for each in sources), order.fingerprint(), *start.fingerprint))
        begun = _begin_or_resume(config, folder, trainer, digest)
        module = _module(start, digest)
        batches, validation = _loaders(start, trainer, sources, order, begun.done)
        _record_beginning(start, begun, module, trainer, sources, order, skipped, best)

        before = _fit(module, trainer, batches, validation, begun.checkpoint, folder)
        if trainer.is_global_zero:
            after = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            shut_down(validation)
            taken = duration(time.monotonic() - started)
            pace = f"{counted(trainer.global_step - begun.done, 'update')} in {taken}, validations included"
            conclude(config, _images(sources), export(module, folder), (before, after), best, pace)


def _order(config: TrainConfig, trainer: lightning.Trainer, images: Source) -> Order:
    """Return the order of the training images.

    Reading the sizes of many images takes a while, so the first process shows a progress bar.
    """
    together = images_per_update(config, trainer)
    show = partial(track, label="Reading sizes") if trainer.is_global_zero else lambda sizes, _: sizes
    return order_of(images, config.data, config.seed, together, config.model.downsample_factor, show)


def _begin_or_resume(config: TrainConfig, folder: Path, trainer: lightning.Trainer, digest: str) -> Begun:
    """Make the run's directory, or find the checkpoint to resume from and check that it fits."""
    checkpoint, notes = open_folder(config, folder, is_first=trainer.is_global_zero)
    done = _check_progress(config, trainer, checkpoint, digest) if checkpoint else 0
    return Begun(checkpoint, done, notes)


def _module(start: InitialState, digest: str) -> AutoencoderModule:
    """Build the networks with the weights to begin from.

    `digest` identifies the images, and what their order depends on.
    """
    lightning.seed_everything(start.config.seed, workers=True, verbose=False)
    module = load_initial_weights(start, build_module(start.config))
    module.images_digest = digest
    return module


def _record_beginning(  # noqa: PLR0917
    start: InitialState,
    begun: Begun,
    module: AutoencoderModule,
    trainer: lightning.Trainer,
    sources: Sources,
    order: Order,
    skipped: SkippedImages,
    best: Best,
) -> None:
    """Write the files and print the lines with which a run begins.

    The first process does most of it; every logger learns where the run stands.
    """
    resumed = begun.checkpoint is not None

    skipped.begin(trainer.global_rank, resumed=resumed)
    if trainer.is_global_zero:
        if isinstance(order, BucketOrder):
            skipped.add(without_bucket(sources[0], order), TRAINING, begun.done)
        best.begin(resumed=resumed)
        record_origin(start, best.run, sources, resumed=resumed)
        notes = (*start.notes, *begun.notes, *_passed_over(sources))
        announce(start.config, module, best.run, _images(sources), begun.done, notes, trainer)

    for logger in trainer.loggers:
        if resumed and isinstance(logger, (MetricsFile, TensorBoard)):
            logger.resume_at(begun.done)
        logger.log_hyperparams(hyperparameters(start.config))


def _images(sources: Sources) -> Images:
    """Return how many images there are, and whether they come from the caller's own sources."""
    training, validation = sources
    own = next((type(source).__name__ for source in sources if not type(source).__module__.startswith("vae.")), None)
    return Images(len(training), len(validation), own)


def _passed_over(sources: Sources) -> list[str]:
    """Return a note for each folder that has pictures of kinds that cannot be read."""
    folders = {source.root: source.passed_over for source in sources if isinstance(source, Files)}
    return [in_words(passed_over, root) for root, passed_over in folders.items() if passed_over]


def _fit(  # noqa: PLR0917
    module: AutoencoderModule,
    trainer: lightning.Trainer,
    batches: DataLoader[Batch],
    validation: DataLoader[Batch],
    checkpoint: Path | None,
    folder: Path,
) -> Mapping[str, float]:
    """Make all updates, with a validation before the first and after the last; return what the first one measured.

    A resumed run has no validation before its first update, so the result is empty.
    """
    os.environ[RUN_NAME] = folder.name  # read by the processes that Lightning starts

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
        for logger in trainer.loggers:
            if isinstance(logger, WeightsAndBiases):
                logger.close()

    return before


def _loaders(
    start: InitialState, trainer: lightning.Trainer, sources: Sources, order: Order, done: int
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """Return the training batches from update `done` on, and this process's share of the validation images."""
    images, held_out = sources
    config = start.config
    first = done * images_per_update(config, trainer)
    channels = config.model.in_channels

    sampler = EndlessSampler(order, first, trainer.global_rank, trainer.world_size)
    kind = TrainingImages if start.latents is None else partial(ImagesWithLatents, start.latents)
    batches = training_loader(kind(images, order, config.data, channels, config.seed), sampler)
    return batches, validation_loader(held_out, config.data, channels, trainer.global_rank, trainer.world_size)


def _check_progress(config: TrainConfig, trainer: lightning.Trainer, checkpoint: Path, images: str) -> int:
    """Return the updates done.

    Raises InputError if the images, or the number of them in an update, have changed: the order of the data would
    jump.
    """
    progress = read_progress(checkpoint)
    now = images_per_update(config, trainer)
    require(
        now == progress.images_per_update,
        f"data.batch_size={config.data.batch_size}, {trainer.world_size} processes and accumulation over "
        f"{trainer.accumulate_grad_batches}: {now} images an update",
        f"a product of {progress.images_per_update}, as the run had",
    )

    more = f"at least the {progress.updates} that are done"
    require(config.updates >= progress.updates, f"updates={config.updates}", more)

    is_known = images == progress.images
    if config.teacher is not None:  # earlier versions did not note the teacher's configuration
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
    """Refuse a name with the time in it if others than Lightning start the processes.

    Each of these would put its own time into the name.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)

    lightnings = environment is None or isinstance(environment, LightningEnvironment)
    needs = trainer.world_size > 1 and not lightnings and config.resume in {None, AUTO}
    require(not needs or TIME not in config.name, f"name={config.name!r}", "a fixed name under torchrun or SLURM")


def _check_enough(config: TrainConfig, training: Source, validation: Source, processes: int) -> None:
    """Check that there are training images, and a validation image for every process."""
    if not len(training):
        given = f"data.root={config.data.root!r}"
        raise InputError(f"{given}: no image is left to train on; add images or set data.validation_root")

    fewest = f"at least one for each of the {processes} processes; raise data.validation_fraction or add images"
    require(len(validation) >= processes, f"{len(validation)} validation images", fewest)
