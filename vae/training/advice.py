"""Signs of trouble in words: what is wrong, and what to change."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning
from lightning.pytorch import Callback

from vae.latents import ACTIVE
from vae.losses.objective import LossConfig
from vae.metrics.registry import OF_SETS
from vae.training.console import warn
from vae.training.loss_scale import MANY, RECENT
from vae.training.module import Training

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
        assert isinstance(pl_module, Training)
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
        assert isinstance(pl_module, Training)
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

    def _say_what_is_not_finite(self, trainer: lightning.Trainer, training: Training) -> None:
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
