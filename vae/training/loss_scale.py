"""float16's loss scale: an update that overflows at it is made again, of the same images, at half of it.

torch's GradScaler leaves such an update out and lowers its scale. Counted as made, it would move the clock, the
schedule and every running mean without a step of the optimiser; not counted, the images would run ahead of the clock.
"""

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae.training.module import Training

SMALLEST = 1e-4  # as fairseq's; gradients that overflow float16 even there are no accident
RECENT, MANY = 100, 10  # updates; so many of them that overflow are no accident either


class LossScale:
    """The scale of a run's GradScaler; in other precisions there is none, and nothing overflows."""

    def __init__(self, training: "Training") -> None:
        self._training = training
        self._tried: list[float] = []  # for the update at hand
        self._recent: deque[bool] = deque(maxlen=RECENT)  # was the update made again?

    @property
    def used(self) -> float | None:
        """That of the gradients at hand."""
        return self._tried[-1] if self._tried else None

    @property
    def can_fall(self) -> bool:
        """Would gradients that are not finite be the scaler's to mend?"""
        return self.used is not None and self.used >= SMALLEST

    @property
    def has_fallen(self) -> bool:
        """Has the scaler left out the step that was just tried?"""
        now = self._now()
        return now is not None and self.used is not None and now < self.used

    @property
    def falls_often(self) -> bool:
        return sum(self._recent) >= MANY

    def note(self) -> None:
        """The gradients of an update are unscaled, and about to be looked at."""
        now = self._now()
        if now is not None:
            self._tried.append(now)

    def restore(self) -> None:
        """As before the update at hand: what is wrong with it is not the scale."""
        if self._tried:
            scaler = self._scaler
            scaler.load_state_dict(scaler.state_dict() | {"scale": self._tried[0]})

    def close(self) -> None:
        """The update at hand is over."""
        self._recent.append(len(self._tried) > 1)
        self._tried.clear()

    def _now(self) -> float | None:
        return None if self._scaler is None else self._scaler.get_scale()

    @property
    def _scaler(self) -> Any:
        return getattr(self._training.trainer.precision_plugin, "scaler", None)
