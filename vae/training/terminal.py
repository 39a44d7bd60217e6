"""What a run prints on the terminal: how it begins, how far it is, and what it made."""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import rich.progress
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.table import Column

from vae.config.data import DataConfig
from vae.config.schema import TrainConfig
from vae.console import print_table, say
from vae.distributed import workers_for
from vae.losses.autoencoder_loss import RECONSTRUCTION_TERMS
from vae.metrics.registry import METRICS
from vae.run_dir import FILE_ENDING, RunDir
from vae.training.checkpointing import Best
from vae.training.module import AutoencoderModule, images_per_update
from vae.training.optim import learning
from vae.weights import lost_in_half
from vae.weights.describe import clients_of, warnings_about
from vae.weights.families import families_of
from vae.weights.loaded import config_in
from vae.weights.safetensors_io import read_index
from vae.weights.taesd import SCALE

ALWAYS = ("diffusers", "kohya sd-scripts (folder)")  # they load a network of any size
FEW_IMAGES = 8  # below it a validation shows whether a run learns, and not which of two exports is better
LINE_EVERY = 30.0  # seconds
SHOWN = ("total", *RECONSTRUCTION_TERMS, "adversarial")  # terms beside the pace


class Images(NamedTuple):
    """How many images a run has, and the class of the caller's own sources if they are such."""

    training: int
    validation: int
    own: str | None


class Progress(Callback):
    """Say how far a run is, and log its pace.

    On a terminal there is one bar, and one line is kept of each validation. Elsewhere, in a log file, there is a line
    every LINE_EVERY seconds and at each validation. Times do not count validations, except the time that is left.
    """

    def __init__(self, best: Best, every: int, *, has_bar: bool) -> None:
        self.best = best
        self.every = every  # updates between two logged ones
        self._bar = None
        if has_bar and Console().is_terminal:
            numbers = TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True))
            self._bar = rich.progress.Progress(BarColumn(16), MofNCompleteColumn(), numbers)
        self._begun = self._marked = self._said = time.monotonic()
        self._first = 0  # the update at which this session began
        self._images = 0  # since the last mark
        self._validating = self._validation = 0.0  # seconds: of all validations of this session, of the last one

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock, and the bar."""
        self._begun = self._marked = self._said = time.monotonic()
        self._first = trainer.global_step
        self._validating = 0.0
        if self._bar is not None and trainer.is_global_zero:
            self._bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, numbers="")
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the pace where the terms are logged; move the bar, or print a line if it is time."""
        self._images += len(batch.images) * trainer.world_size
        if (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches):
            return

        now = time.monotonic()
        rate = self._images / max(now - self._marked, 1e-9)
        pl_module.log("pace/images_per_second", rate, rank_zero_only=True)
        pl_module.log("pace/seconds", now - self._begun - self._validating, rank_zero_only=True)
        self._marked = now
        self._images = 0
        if not trainer.is_global_zero:
            return

        if self._bar is not None:
            numbers = self._numbers(trainer, rate, SHOWN[:1])
            self._bar.update(TaskID(0), completed=trainer.global_step, numbers=numbers)
        elif now - self._said >= LINE_EVERY:
            self._said = now
            say(f"update {trainer.global_step:,} of {trainer.max_steps:,}: {self._numbers(trainer, rate, SHOWN)}")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop counting the time as training."""
        self._validation = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print what the validation measured, and whether it is the best so far."""
        assert isinstance(pl_module, AutoencoderModule)
        self._validation = time.monotonic() - self._validation
        self._validating += self._validation
        self._marked += self._validation
        if not trainer.is_global_zero:
            return

        measured = pl_module.validation.measured
        shown = [f"{name} {measured[name]:.{METRICS[name].digits}f}" for name in METRICS if name in measured]
        kept = self.best.kept
        if kept is not None and kept.updates == pl_module.updates:
            shown.append(f"new best {kept.metric}")
        self._said = time.monotonic()
        say(f"validation at update {pl_module.updates:,} of {trainer.max_steps:,}: {', '.join(shown)}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away, so that the error stands below it."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _numbers(self, trainer: lightning.Trainer, rate: float, names: Sequence[str]) -> str:
        """Return the terms of these names, the pace and the time that is left, in one line."""
        found = trainer.callback_metrics
        terms = [f"{name} {found[f'train/{name}']:.3g}" for name in names if f"train/{name}" in found]
        return f"{', '.join(terms)}, {rate:.3g} images/s, {duration(self._left(trainer))} left"

    def _left(self, trainer: lightning.Trainer) -> float:
        """Return the seconds until the end, at the mean pace of this session, validations included."""
        taken = time.monotonic() - self._begun - self._validating
        left = trainer.max_steps - trainer.global_step
        batches = int(trainer.val_check_interval)
        validations = math.ceil(left * trainer.accumulate_grad_batches / batches)
        return taken / max(trainer.global_step - self._first, 1) * left + validations * self._validation


def counted(number: int, thing: str) -> str:
    """Return a number of things, as 1 thread or 2 threads."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def duration(seconds: float) -> str:
    """Return a time in the units that a person reads: 40 s, 6 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def announce(  # noqa: PLR0917
    config: TrainConfig,
    training: AutoencoderModule,
    folder: Path,
    images: Images,
    done: int,
    notes: Sequence[str],
    trainer: lightning.Trainer,
) -> None:
    """Print what the run trains, on which images and machine, where its files go; then notes and likely mistakes.

    `done` is the number of updates that are done.
    """
    parameters = sum(parameter.numel() for parameter in training.autoencoder.parameters())

    sides = config.data.bucket_resolutions
    shape = f", trained in buckets of about {' and '.join(map(str, sides))} px squared" if sides else ""
    network = f"{config.model.kind.network} f{config.model.downsample_factor}c{config.model.latent_channels}"
    say(
        f"{network} of {parameters:,} parameters, {images.training:,} training and {images.validation:,} validation "
        f"images of {images.own or config.data.source} at {config.data.resolution} px{shape}, "
        f"updates {done:,} to {config.updates:,}; everything goes to {folder}"
    )

    say(_machine(config, trainer))

    if config.frozen or config.trained or config.teacher:
        say(_what_learns(config, training))
    if images.validation < FEW_IMAGES:
        more = "raise data.validation_fraction, or name others"
        more = "your own are named by data=folder data.root=FOLDER" if config.data.source == "photos" else more
        more = "give more of them" if images.own else more
        few = counted(images.validation, "validation image")
        say(f"note: {few} can show that a run learns, and not which of two exports is better: {more}")
    together = images_per_update(config, trainer)
    if images.training < together:
        few = counted(images.training, "training image")
        say(f"note: {few}, and {together} in an update: the same ones come again in it")
    if config.loss.weights.adversarial and config.loss.adversarial_start >= config.updates:
        say(
            f"The adversarial term starts at update {config.loss.adversarial_start}, after this run ends: "
            f"lower loss.adversarial_start to have it"
        )

    starts = (config.loss.discriminator_start, config.loss.adversarial_start)
    if config.loss.weights.adversarial and not config.loss.adversarial_ramp and starts[0] == starts[1]:
        say(
            "The discriminator counts in full from its first update on, untrained: raise loss.adversarial_start above "
            "loss.discriminator_start, or loss.adversarial_ramp"
        )

    for note in notes:
        say(f"note: {note}")


def _machine(config: TrainConfig, trainer: lightning.Trainer) -> str:
    """Return on what the run computes: device, precision, threads, data workers, and the images of an update."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    workers = counted(workers_for(config.data.workers), "data worker")
    together = images_per_update(config, trainer)
    return f"On {processes}{name}, precision {trainer.precision}{threads}, {workers}, {together} images an update"


def _what_learns(config: TrainConfig, training: AutoencoderModule) -> str:
    """Return which parts learn, and from which latents."""
    parameters = sum(parameter.numel() for parameter in learning(training.autoencoder))
    parts = f": only {', '.join(config.trained)}" if config.trained else ""
    parts = f": frozen are {', '.join(config.frozen)}" if config.frozen else parts

    drawn = {"sampled": "samples", "mean": "means"}[config.latents]
    whose = "the posterior" if config.teacher is None else f"the teacher's posterior ({config.teacher})"
    decoded = f"decoded are {drawn} of {whose}" if training.autoencoder.is_variational else "decoded are its latents"
    decoded = decoded if training.autoencoding.decodes else "nothing is decoded"

    made = "" if config.data.latents is None else f"; no image is encoded but to validate: {config.data.latents}"
    return f"{parameters:,} of them learn{parts}; {decoded}{made}"


def _same_images(data: DataConfig, images: Images) -> str:
    """Return overrides with which an evaluation measures the images that training was validated on.

    Training validates on at most `data.validation_images` of them; the evaluation is not limited to these. Of the
    caller's own sources the command line knows nothing, so a folder stands in their place.
    """
    if images.own:
        return f"data=folder data.root=FOLDER_OF_HELD_OUT_IMAGES data.resolution={data.resolution}"

    chosen = {"data": data.source, "data.resolution": data.resolution}
    if data.source != "photos":
        other = data.validation_split if data.source == "huggingface" else data.validation_root
        chosen |= {"data.root": data.validation_root or data.root}
        chosen |= {"data.validation_fraction": data.validation_fraction} if other is None else {}
        if other is None and data.validation_at_least != DataConfig.validation_at_least:
            chosen |= {"data.validation_at_least": data.validation_at_least}
        chosen |= {"data.split": other or data.split} if data.source == "huggingface" else {}
        chosen |= {"data.column": data.column} if data.column else {}
        chosen |= {"data.streaming": "true"} if data.streaming else {}
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in chosen.items())


def _came(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Say what the first and the last validation measured, the reconstructions' metrics alone."""
    parts = []
    for name, about in METRICS.items():
        key = f"val/{name}"
        if key in after:
            begun = f"{before[key]:.{about.digits}f} -> " if key in before else ""
            parts.append(f"{name} {begun}{after[key]:.{about.digits}f}")
    return f"done: {', '.join(parts)} (EMA weights, held-out images)"


def conclude(  # noqa: PLR0917
    config: TrainConfig,
    images: Images,
    exports: Sequence[Path],
    metrics: tuple[Mapping[str, float], Mapping[str, float]],
    best: Best,
    pace: str,
) -> None:
    """Print what came of the run, the files that it made, and notes about the exported weights.

    `metrics` are those of the first and the last validation; `pace` is the last line.
    """
    before, after = metrics
    say(_came(before, after))
    if config.verbose:
        names = sorted(name for name in after if not name.startswith("val/kl_"))
        rows = [(name, f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}") for name in names]
        print_table(("validation (EMA weights)", "at the start", "at the end"), rows)

    run = exports[0].parents[2]
    folder = exports[0].parent if best.kept is None else best.folder
    left = {
        "weights": f"{folder}{'' if best.kept is None else f', the best: {best.kept}'}",
        "look at": f"{RunDir(run).curves} and {RunDir(run).pictures}",
        "measure": f"vae evaluate model={shlex.quote(str(run))} {_same_images(config.data, images)}",
    }

    file = exports[-1] if best.kept is None else next(folder.glob(f"*{FILE_ENDING}"), exports[-1])  # by any name
    index = read_index(file)
    exported = config_in(file, index.metadata)
    assert exported is not None
    if len(clients_of(exported)) > len(ALWAYS):
        left["install"] = f"vae install {shlex.quote(str(run))} --webui FOLDER_OF_THE_WEB_UI"

    for label, text in left.items():
        say(f"{label:>8}  {text}")

    is_kept = exported.scaling_factor == config.model.scaling_factor
    kept = "as before" if exported.scale_is_known else "assumed, and marked so in the file"
    say(f"scaling factor {exported.scaling_factor:.5g}, {kept if is_kept else 'measured'}")

    for warning in warnings_about(exported):
        say(f"note: {warning}")
    lost = lost_in_half(exports[0])
    if lost is not None:
        say(f"note: {lost}")

    # ComfyUI needs the scale entries to know for which latents the file of a tiny autoencoder is.
    families = families_of(exported) if exported.latents_are_scaled else []
    if families and SCALE[0] not in index.entries:
        command = f"vae convert {shlex.quote(str(run))} NAME.safetensors --family {families[0]}"
        others = "".join(f", or {family}" for family in families[1:])
        say(f"note: ComfyUI must be told whose latents the one file has: {command}{others}")

    say(pace)
