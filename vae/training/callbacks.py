"""`skipped.jsonl`: images that could not be used, each once, as they were met; too many of them stop the run.

Signs of trouble in words: what is wrong, and what to change.

At every validation, a picture of what the model does to the same held-out images.

`metrics.csv`: one row for each update at which something was logged."""

import csv
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vae.config.loss import LossConfig
from vae.console import warn
from vae.data.contact_sheet import reconstruction_sheet
from vae.data.decode import printable
from vae.data.pixels import as_depth
from vae.data.sources import Skipped
from vae.files import replacing, write_text
from vae.latents import ACTIVE
from vae.metrics.registry import OF_SETS
from vae.training.guard import MANY, RECENT
from vae.training.interruption import StopRequests
from vae.training.module import AutoencoderModule
from vae.training.run_dir import step_name

ALWAYS_ALLOWED = 10  # corrupt images, in however small a data set
TOLD_EVERY = 8  # batches: processes tell each other of corrupt images
TRAINING, VALIDATION = "training", "validation"


class SkippedImages(Callback):
    """Lists what each batch could not use. Process r > 0 has its own list, skipped_r.jsonl.

    `limit` is the share of the training `images` that may be corrupt, over all processes; any number may be only too
    small. What an interrupted run has listed is not listed again, but counts only if it is met again: it may have been
    repaired.
    """

    def __init__(self, run: Path, limit: float, images: int, requests: StopRequests) -> None:
        self.run, self.requests = run, requests
        self.allowed = max(ALWAYS_ALLOWED, limit * images)
        self._file = run / "skipped.jsonl"
        self._known: set[tuple[str, str]] = set()  # (training or validation, name)
        self._corrupt: set[str] = set()  # of all processes
        self._untold: set[str] = set()  # of this one

    def begin(self, rank: int, *, resumed: bool) -> None:
        if rank:
            self._file = self.run / f"skipped_{rank}.jsonl"
        if not resumed:
            self._file.unlink(missing_ok=True)  # of a run that has left nothing else
        elif self._file.is_file():
            rows = list(_rows(self._file))
            write_text(self._file, "".join(f"{json.dumps(row)}\n" for row in rows))  # without a line that a kill cut
            self._known = {(row["of"], row["image"]) for row in rows}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AutoencoderModule)
        self.add(batch.skipped, TRAINING, trainer.global_step)
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
        self.add(batch.skipped, VALIDATION, trainer.global_step)

    def add(self, skipped: Iterable[Skipped], of: str, updates: int) -> None:
        skipped = list(skipped)
        if of == TRAINING:
            self._untold |= {one.name for one in skipped if one.is_corrupt} - self._corrupt
        new = {one.name: one for one in skipped if (of, one.name) not in self._known}
        if not new:
            return
        if not self._known:
            first = printable(next(iter(new)))
            warn(f"warning: some images are left out; they are listed in {self._file}. The first: {first}")
        self._known |= {(of, name) for name in new}
        with self._file.open("a", encoding="utf-8") as file:
            for one in new.values():
                row = {"image": one.name, "of": of, "corrupt": one.is_corrupt, "reason": one.reason, "updates": updates}
                file.write(f"{json.dumps(row)}\n")


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # a kill cut it


WINDOW = 20  # logged updates in a row: one bad batch is no trouble
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
    """Something to say once, when the means over a window of logged updates show it."""

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
    """Reads what is logged, when it is logged; says each thing once."""

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
        if not trainer.is_global_zero or (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches):
            return
        assert isinstance(pl_module, AutoencoderModule)
        names = {name for name in trainer.callback_metrics if name.startswith("train/")}
        self._window.append({name.removeprefix("train/"): float(trainer.callback_metrics[name]) for name in names})
        if pl_module.guard.loss_scale.falls_often:
            self._say(trainer, OVERFLOWS)
        if len(self._window) == WINDOW:
            shared = set.intersection(*(set(row) for row in self._window))
            means = {name: sum(row[name] for row in self._window) / WINDOW for name in shared}
            for sign in SIGNS:
                if sign.shows(means, pl_module.config.loss):
                    self._say(trainer, sign.words)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, AutoencoderModule)
        if trainer.is_global_zero:
            self._say_what_is_not_finite(trainer, pl_module)
        if not trainer.is_global_zero or pl_module.updates == 0 or not pl_module.posterior_learns:
            return
        if not pl_module.autoencoder.is_variational:
            return
        latents = pl_module.validation.latents
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
        """Of the metrics that a validation should have: each would be an empty place in a table, and no best export."""
        validation, best = training.validation, training.config.best_metric
        wanted: list[str] = [*validation.metrics.names]
        if best is not None and best not in wanted:
            wanted.append(best)  # of sets

        measured = validation.measured
        for name in (name for name in wanted if measured and not math.isfinite(measured.get(name, math.nan))):
            untold = SETS_NEED if name in OF_SETS else "no image has a finite one"
            lost = "; exports/best is chosen by it, and this validation writes none: keep_best= names another metric"
            reason = validation.absent.get(name, untold)
            self._say(trainer, f"validation has no finite {name}: {reason}{lost if name == best else ''}")

    def _say(self, trainer: lightning.Trainer, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            warn(f"note, update {trainer.global_step}: {words}")


def _reconstruction(means: Means, loss: LossConfig) -> float:
    return sum(getattr(loss.weights, name) * means.get(name, 0.0) for name in ("pixel", "perceptual"))


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


CLOCK = "updates"


class MetricsFile(Logger):
    """Appended to, and rewritten at once where a column is new: readable after a kill, and a resumed run goes on in it.

    `clock` gives the updates done.
    """

    def __init__(self, path: Path, clock: Callable[[], int]) -> None:
        super().__init__()
        self.path, self._clock = path, clock
        self._rows: dict[int, dict[str, Any]] = {}
        self._columns: list[str] = []
        self._written: set[int] = set()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self._rows[int(row[CLOCK])] = {name: value for name, value in row.items() if value}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """The configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        updates = self._clock()
        if updates in self._written:
            self._columns = []  # the file has this row without what comes now
        row = self._rows.setdefault(updates, {CLOCK: updates})
        row |= {name: value for name, value in metrics.items() if name != "epoch"}

    def resume_at(self, updates: int) -> None:
        """Forget the rows after `updates`: they are about to be lived through again."""
        self._rows = {done: row for done, row in self._rows.items() if done <= updates}

    @rank_zero_only
    def save(self) -> None:
        """Append the rows that are complete: all but the newest, to which a validation may still add."""
        self._write(sorted(self._rows)[:-1])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write(sorted(self._rows))

    def _write(self, complete: list[int]) -> None:
        columns = [CLOCK, *sorted({name for done in complete for name in self._rows[done]} - {CLOCK})]
        fresh = [done for done in complete if done not in self._written]
        if columns != self._columns:  # a new term, or the start of a session: the whole file anew
            with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self._rows[done] for done in complete)
            self._columns, self._written = columns, set(complete)
        elif fresh:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(self._rows[done] for done in fresh)
            self._written |= set(fresh)
