"""What a run reports besides checkpoints: skipped images, advice, pictures and metrics.

`SkippedImages` lists images that could not be used in `skipped.jsonl` and stops the run if too many are corrupt.
`Advice` prints what is going wrong and which setting to change. `Pictures` draws the same held-out images at every
validation, and `Curves` the page of all that was logged.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback
from torch import Tensor

from vae import curves
from vae.config.loss import LossConfig
from vae.console import warn
from vae.data.contact_sheet import reconstruction_sheet
from vae.data.pixels import as_depth
from vae.data.sources import Skipped
from vae.errors import InputError, printable
from vae.files import replacing, write_text
from vae.latents import ACTIVE
from vae.losses.autoencoder_loss import RECONSTRUCTION_TERMS
from vae.metrics.registry import OF_SETS
from vae.run_dir import RunDir, step_name
from vae.training.guard import MANY, RECENT
from vae.training.interruption import StopRequests
from vae.training.loggers import MetricsFile, ShowsPictures
from vae.training.module import AutoencoderModule

ALWAYS_ALLOWED = 10  # corrupt images that are allowed in a data set of any size
TOLD_EVERY = 8  # batches between two exchanges of corrupt images among the processes
TRAINING, VALIDATION = "training", "validation"


class SkippedImages(Callback):
    """List the images of each batch that could not be used, each once. Process r > 0 writes skipped_r.jsonl.

    `limit` is the share of the training `images` that may be corrupt, counted over all processes; ALWAYS_ALLOWED of
    them always may be. An image that an interrupted run has listed is not listed again. It counts only if it is met
    again, since it may have been repaired.
    """

    def __init__(self, run: Path, limit: float, images: int, requests: StopRequests) -> None:
        self.run = run
        self.requests = requests
        self.allowed = max(ALWAYS_ALLOWED, limit * images)
        self._file = RunDir(run).skipped
        self._known: set[tuple[str, str]] = set()  # (training or validation, name)
        self._corrupt: set[str] = set()  # names known to all processes
        self._untold: set[str] = set()  # names that only this process knows

    def begin(self, rank: int, *, resumed: bool) -> None:
        """Open the list of process `rank`. A new run deletes an old list; a resumed run reads it."""
        if rank:
            self._file = self.run / f"skipped_{rank}.jsonl"
        if not resumed:
            self._file.unlink(missing_ok=True)  # from a run that has left nothing else
        elif self._file.is_file():
            rows = list(_rows(self._file))
            write_text(self._file, "".join(f"{json.dumps(row)}\n" for row in rows))  # drops a line cut by a kill
            self._known = {(row["of"], row["image"]) for row in rows}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """List what this batch skipped, and ask the run to stop if too many images are corrupt."""
        assert isinstance(pl_module, AutoencoderModule)
        self.add(batch.skipped, TRAINING, trainer.global_step)

        # A collective waits for all processes, so they exchange names only now and then, and only if there are any.
        if batch_idx % TOLD_EVERY == 0 and pl_module.process_group.all_reduce_max(len(self._untold)):
            self._corrupt = self._corrupt.union(*pl_module.process_group.all_gather(self._untold))
            self._untold = set()

        self.requests.has_bad_images = len(self._corrupt) > self.allowed

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """List what this validation batch skipped."""
        self.add(batch.skipped, VALIDATION, trainer.global_step)

    def add(self, skipped: Iterable[Skipped], of: str, updates: int) -> None:
        """Append the images that are not yet listed, and warn at the first one.

        `of` is TRAINING or VALIDATION; `updates` says when the images were met.
        """
        skipped = list(skipped)
        if of == TRAINING:
            self._untold |= {one.name for one in skipped if one.is_corrupt} - self._corrupt

        new = {one.name: one for one in skipped if (of, one.name) not in self._known}
        if not new:
            return

        if not self._known:
            first = printable(next(iter(new)))
            warn(f"some images are skipped; they are listed in {self._file}. The first: {first}")

        self._known |= {(of, name) for name in new}
        with self._file.open("a", encoding="utf-8") as file:
            for one in new.values():
                row = {"image": one.name, "of": of, "corrupt": one.is_corrupt, "reason": one.reason, "updates": updates}
                file.write(f"{json.dumps(row)}\n")


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows of a list up to one that a kill cut short."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # the process was killed while it wrote this line


WINDOW = 20  # logged updates in a row, since one bad batch means nothing
CLAMPED = 0.01
SETS_NEED = "it takes two images, and Inception's weights where every process finds them"
HELD_BACK = 0.9
LEAST_SCALE = 1.0
OVERFLOWS = (
    f"of the last {RECENT} updates {MANY} or more overflow float16 and are made again at a lower loss scale: "
    f"trainer.precision=bf16-mixed, or lower optim.learning_rate"
)

Means = Mapping[str, float]


class Sign(NamedTuple):
    """One sign of trouble: `words` are printed once, when the means over a window of logged updates satisfy `shows`."""

    shows: Callable[[Means, LossConfig], bool]
    words: str


SIGNS = (
    Sign(
        lambda means, _: means.get("discriminator_accuracy", 0.0) > 0.95,
        "the discriminator wins (right in more than 95 %): lower optim.discriminator_learning_rate, set loss.r1=0.1 or "
        "loss.lecam=0.1, and for few images loss.augment=[color,translation,cutout]",
    ),
    Sign(
        lambda means, _: "logit_gap" in means and abs(means["logit_gap"]) < 0.01,
        "the discriminator sleeps (real and reconstructed images get the same logits): start it earlier with "
        "loss.discriminator_start, or raise optim.discriminator_learning_rate",
    ),
    Sign(
        lambda means, _: means.get("adversarial_share", 1.0) < HELD_BACK,
        f"the adaptive weight stands at its bound: the adversary has less than {HELD_BACK:.0%} of the gradient that "
        "loss.weights.adversarial asks for (train/adversarial_share). Raise loss.adaptive_bound, or, where the "
        "discriminator sleeps, see to that first",
    ),
    Sign(
        lambda means, loss: loss.weights.kl * means.get("kl", 0.0) > _reconstruction(means, loss),
        "the KL term outweighs the reconstruction terms, so the latents will collapse: lower loss.weights.kl (1e-6 is "
        "LDM's), or warm it up with loss.kl_warmup",
    ),
    Sign(
        lambda means, _: means.get("loss_scale", LEAST_SCALE) < LEAST_SCALE,
        f"float16's loss scale is below {LEAST_SCALE:g}, where small gradients vanish: trainer.precision=bf16-mixed or "
        "32-true",
    ),
)


class Advice(Callback):
    """Read the logged values whenever they are logged, and give each piece of advice once."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._window: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._idle: set[int] = set()
        self._said: set[str] = set()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look for signs of trouble in the last WINDOW logged updates."""
        if not trainer.is_global_zero or (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches):
            return
        assert isinstance(pl_module, AutoencoderModule)

        names = {name for name in trainer.callback_metrics if name.startswith("train/")}
        self._window.append({name.removeprefix("train/"): float(trainer.callback_metrics[name]) for name in names})

        if pl_module.guard.loss_scale.falls_often:
            self._say(trainer, OVERFLOWS)

        if len(self._window) == WINDOW:
            # Only terms that every update of the window logged have a mean over it.
            shared = set.intersection(*(set(row) for row in self._window))
            means = {name: sum(row[name] for row in self._window) / WINDOW for name in shared}
            for sign in SIGNS:
                if sign.shows(means, pl_module.config.loss):
                    self._say(trainer, sign.words)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Report metrics that are not finite, latent channels that stay unused, and log-variances at their bounds."""
        assert isinstance(pl_module, AutoencoderModule)
        if trainer.is_global_zero:
            self._say_what_is_not_finite(trainer, pl_module)

        # The rest is about the posterior, which only a trained variational encoder changes.
        if not trainer.is_global_zero or pl_module.updates == 0 or not pl_module.posterior_learns:
            return
        if not pl_module.autoencoder.is_variational:
            return

        latents = pl_module.validation.latents

        # A channel is reported when two validations in a row find it idle.
        before, self._idle = self._idle, set((~latents.channel_is_active).nonzero().flatten().tolist())
        if self._idle & before:
            self._say(
                trainer,
                f"latent channels {sorted(self._idle & before)} say nothing of the image (their posterior mean varies "
                f"by less than {ACTIVE}): lower loss.weights.kl, warm it up with loss.kl_warmup, or take fewer of them",
            )

        if latents.clamped_share > CLAMPED:
            self._say(
                trainer,
                f"{latents.clamped_share:.0%} of the posterior's log-variances stand at their bounds, where they have "
                f"no gradient: lower optim.learning_rate, or raise loss.weights.kl",
            )

    def _say_what_is_not_finite(self, trainer: lightning.Trainer, training: AutoencoderModule) -> None:
        """Report the metrics that a validation should have and has not.

        Each would be an empty cell in a table, and if exports/best is chosen by it, no best export.
        """
        validation = training.validation
        best = training.config.best_metric
        wanted: list[str] = [*validation.metrics.names]
        if best is not None and best not in wanted:
            wanted.append(best)  # a metric of image sets: rFID or KID

        measured = validation.measured
        for name in (name for name in wanted if measured and not math.isfinite(measured.get(name, math.nan))):
            untold = SETS_NEED if name in OF_SETS else "no image has a finite one"
            lost = "; exports/best is chosen by it, and this validation writes none: keep_best= names another metric"
            reason = validation.absent.get(name, untold)
            self._say(trainer, f"validation has no finite {name}: {reason}{lost if name == best else ''}")

    def _say(self, trainer: lightning.Trainer, words: str) -> None:
        """Print `words` with the number of the update, unless they were printed before."""
        if words not in self._said:
            self._said.add(words)
            warn(words, f"note, update {trainer.global_step}")


def _reconstruction(means: Means, loss: LossConfig) -> float:
    """Return the weighted sum of the means of all terms that compare images with reconstructions."""
    return sum(getattr(loss.weights, name) * means.get(name, 0.0) for name in RECONSTRUCTION_TERMS)


PICTURED = 8  # held-out images on every sheet


REDRAW = 60.0  # seconds


class Curves(Callback):
    """Draw curves.html while the run goes: at every validation, and between them once in REDRAW seconds."""

    def __init__(self, run: Path, every: int) -> None:
        self.run = RunDir(run)
        self.every = every
        self._drawn = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw the page if it is time to."""
        is_logged = not (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches)
        if is_logged and time.monotonic() - self._drawn >= REDRAW:
            self._draw(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the page, with what the validation measured."""
        self._draw(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the page for the last time."""
        self._draw(trainer)

    def _draw(self, trainer: lightning.Trainer) -> None:
        """Draw what was logged so far. A page that cannot be written stops no run."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
        if logger is None or not trainer.is_global_zero:
            return
        self._drawn = time.monotonic()
        series = curves.series_of(logger.rows())
        if series:
            name = self.run.path.name
            try:
                write_text(self.run.curves, curves.page([curves.Run(name, series, {})], name))
            except InputError as error:
                warn(str(error))


class Pictures(Callback):
    """Save one PNG at every validation: input, reconstruction and error of the same held-out images."""

    def __init__(self, run: Path) -> None:
        self.folder = RunDir(run).pictures
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget the images of the previous validation."""
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
        """Keep the batch's images and reconstructions until there are enough for a sheet."""
        if outputs is not None and sum(len(images) for images, _ in self._pairs) < PICTURED:
            self._pairs.append((as_depth(batch.images.cpu(), 8), outputs.cpu()))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the sheet, save it, and send it to the loggers."""
        if not trainer.is_global_zero or not self._pairs:
            return
        images, reconstructions = (torch.cat(parts)[:PICTURED] for parts in zip(*self._pairs, strict=True))

        sheet = reconstruction_sheet(images, {"reconstruction": reconstructions})
        path = self.folder / f"{step_name(trainer.global_step)}.png"
        with replacing(path) as partial:
            sheet.save(partial, format="PNG")

        for logger in trainer.loggers:
            if isinstance(logger, ShowsPictures):
                logger.log_picture("val/reconstructions", sheet)
