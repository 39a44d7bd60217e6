"""What a run prints on the terminal: how it begins, how far it is, and what it made."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vae.config.data import DataConfig
from vae.config.schema import TrainConfig
from vae.console import say
from vae.run_dir import RunDir
from vae.training.checkpointing import Best
from vae.training.module import AutoencoderModule
from vae.training.optim import learning
from vae.training.validation import ABSENT
from vae.weights import lost_in_half
from vae.weights.describe import warnings_about
from vae.weights.families import families_of
from vae.weights.loaded import config_in
from vae.weights.safetensors_io import read_index
from vae.weights.taesd import SCALE

FEW_IMAGES = 5


class ProgressBar(RichProgressBar):
    """One bar over all updates, where Lightning has one for each epoch."""

    @property
    def total_train_batches(self) -> int | float:
        """All batches of the run."""
        return self.trainer.num_training_batches  # also right where gradients are accumulated

    def _get_train_description(self, current_epoch: int) -> str:
        """Return the text before the bar. Lightning's names the epoch, which means nothing here."""
        return "AutoencoderModule"

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics beside the bar, without the prefix `train/` and Lightning's version number."""
        shown = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in shown.items() if name != "v_num"}


def announce(  # noqa: PLR0917
    config: TrainConfig,
    training: AutoencoderModule,
    folder: Path,
    images: tuple[int, int],
    done: int,
    notes: Sequence[str],
) -> None:
    """Print what the run trains, on which images, and where its files go; then notes and likely mistakes.

    `images` are the numbers of training and validation images, and `done` is the number of updates that are done.
    """
    parameters = sum(parameter.numel() for parameter in training.autoencoder.parameters())

    sides = config.data.bucket_resolutions
    shape = f", trained in buckets of about {' and '.join(map(str, sides))} px squared" if sides else ""
    say(
        f"Autoencoder of {parameters:,} parameters, {images[0]} training and {images[1]} validation images at "
        f"{config.data.resolution} px{shape}, updates {done} to {config.updates}; everything goes to {folder}"
    )

    if config.frozen or config.trained or config.teacher:
        say(_what_learns(config, training))
    if images[1] < FEW_IMAGES:
        say(f"note: few validation images ({images[1]}) say little: raise data.validation_fraction, or name others")
    if config.model.out_channels == 3 and training.validation.sets.inception is None:
        say(f"note: {ABSENT}")
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


def _same_images(data: DataConfig) -> str:
    """Return overrides with which an evaluation measures the images that training was validated on.

    Training validates on at most `data.validation_images` of them; the evaluation is not limited to these.
    """
    chosen = {"data": data.source, "data.resolution": data.resolution}
    if data.source != "photos":
        other = data.validation_split if data.source == "huggingface" else data.validation_root
        chosen |= {"data.root": data.validation_root or data.root}
        chosen |= {"data.validation_fraction": data.validation_fraction} if other is None else {}
        chosen |= {"data.split": other or data.split} if data.source == "huggingface" else {}
        chosen |= {"data.column": data.column} if data.column else {}
        chosen |= {"data.streaming": "true"} if data.streaming else {}
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in chosen.items())


def measuring(sizes: Iterator[tuple[int, int]], total: int) -> Iterable[tuple[int, int]]:
    """Show a progress bar while the sizes of all images are read."""
    return track(sizes, "Reading sizes", total, console=Console(stderr=True), transient=True)


def conclude(
    config: TrainConfig,
    exports: Sequence[Path],
    metrics: tuple[Mapping[str, float], Mapping[str, float]],
    best: Best,
    pace: str,
) -> None:
    """Print the validation before and after, the files that the run made, and notes about the exported weights.

    `metrics` are those of the first and the last validation; `pace` is the last line.
    """
    before, after = metrics
    table = Table("validation (EMA weights)", "at the start", "at the end")
    for name in sorted(name for name in after if not name.startswith("val/kl_")):
        table.add_row(name, f"{before[name]:.4f}" if name in before else "", f"{after[name]:.4f}")
    Console().print(table)

    run = exports[0].parents[2]
    left = {
        "pictures": RunDir(run).pictures,
        "metrics": RunDir(run).metrics,
        **({"diffusers": exports[0]} if len(exports) > 1 else {}),
        "one file": exports[-1],
        **({} if best.kept is None else {"the best": f"{best.folder}: {best.kept}"}),
        "measure": f"vae evaluate model={shlex.quote(str(run))} {_same_images(config.data)}",
    }
    for label, text in left.items():
        say(f"{label:>10}  {text}")

    index = read_index(exports[-1])
    configured = config.model.scaling_factor
    exported = config_in(exports[-1], index.metadata)
    assert exported is not None

    is_kept = exported.scaling_factor == configured
    kept = "as before, is in the export" if exported.scale_is_known else "assumed, is marked so in the export"
    whence = kept if is_kept else f"measured, is in the export; configured was {configured:g}"
    say(f"scaling factor {exported.scaling_factor:.5g}, {whence}")

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
