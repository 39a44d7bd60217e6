"""`train`: from a configuration to a finished run in its own directory."""

import os
import time
from pathlib import Path

import lightning
import torch

from vae.config import TrainConfig
from vae.data.loading import open_sources, training_loader, validation_loader
from vae.data.order import EndlessSampler
from vae.data.sources import ImageFiles
from vae.data.transforms import to_model_range
from vae.errors import InputError, require
from vae.training.export import export
from vae.training.folder import folder_of, open_folder, updates_in
from vae.training.module import Training
from vae.training.terminal import announce, conclude
from vae.training.trainer import build_trainer

RUN_NAME = "VAE_RUN_NAME"  # the processes that Lightning starts compose the configuration anew, and must find the same


def train(config: TrainConfig) -> Path:
    """Run `config` to its last update; returns the run's directory.

    Refuses what cannot work before weights are built: absent images, a Trainer that cannot be, an unusable directory.
    """
    started = time.monotonic()
    training_images, validation_images = open_sources(config.data, config.model.in_channels)
    folder = folder_of(config)
    trainer = build_trainer(config, folder)
    _check_enough(config, training_images, validation_images, trainer.world_size)
    checkpoint = open_folder(config, is_first=trainer.is_global_zero)
    done = updates_in(checkpoint) if checkpoint else 0
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    module = _build_module(config)

    samples_per_update = config.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    sampler = EndlessSampler(
        len(training_images), config.seed, done * samples_per_update, trainer.global_rank, trainer.world_size
    )
    batches = training_loader(training_images, config.data, config.seed, sampler)
    held_out = validation_loader(validation_images, config.data, trainer.global_rank, trainer.world_size)
    if trainer.is_global_zero:
        announce(config, module, folder, (len(training_images), len(validation_images)), done)
    os.environ[RUN_NAME] = config.name
    try:
        before = {} if checkpoint else trainer.validate(module, held_out, verbose=False)[0]
        trainer.fit(module, batches, held_out, ckpt_path=checkpoint, weights_only=True)
        if module.validated_at != trainer.global_step:
            trainer.validate(module, held_out, verbose=False)
    finally:
        os.environ.pop(RUN_NAME, None)
    if trainer.is_global_zero:
        after = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        judged = to_model_range(next(iter(held_out)).images.to(trainer.strategy.root_device))
        exports = export(module, folder, judged)
        minutes, updates = (time.monotonic() - started) / 60, trainer.global_step - done
        conclude(config, exports, (before, after), f"{updates} updates in {minutes:.1f} minutes, start-up included")
    return folder


def _check_enough(config: TrainConfig, training: ImageFiles, validation: ImageFiles, processes: int) -> None:
    if not training:
        given = f"data.root={config.data.root!r}"
        raise InputError(f"{given}: no image is left to train on; add images or set data.validation_root")
    fewest = f"at least one for each of the {processes} processes; raise data.validation_fraction or add images"
    require(len(validation) >= processes, f"{len(validation)} validation images", fewest)


def _build_module(config: TrainConfig) -> Training:
    module = Training(config)
    if config.channels_last:
        module.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.average.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile:
        for block in module.autoencoder.blocks():
            block.compile()  # in place: parameter names stay as they are
    return module
