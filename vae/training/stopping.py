"""Signals and the wall clock: a run that is asked to stop finishes its update, saves, and says so by its status.

Lightning's own handlers are kept out: on SIGTERM they exit with status 0 and no checkpoint, and with several
processes they broadcast from inside the handler, which hangs (Lightning issue 20806).
"""

import signal
import threading
import time
from types import FrameType, TracebackType

import lightning

from vae.errors import BAD_IMAGES, TIME_IS_UP, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """Notes signals while entered; `status` is what the run shall exit with, 0 as long as it shall go on.

    Before `is_training` there is nothing to save: a signal ends the process at once. So does a second SIGINT.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._signalled = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self.is_training = False
        self.has_bad_images = False

    @property
    def status(self) -> int:
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._signalled or (TIME_IS_UP if is_late else BAD_IMAGES if self.has_bad_images else 0)

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_second_interrupt = number == signal.SIGINT and self._signalled == 128 + signal.SIGINT
        self._signalled = 128 + number
        if is_second_interrupt or not self.is_training:
            raise Stopped(self._signalled, f"{reason(self._signalled)}, at once")


def reason(status: int) -> str:
    """In words, why a run ends with `status`."""
    if status == BAD_IMAGES:
        return "more images than data.max_corrupt allows cannot be read; skipped.jsonl lists them: stopped"
    return "max_minutes are over" if status == TIME_IS_UP else f"stopped by {signal.Signals(status - 128).name}"


def keep_lightning_out(trainer: lightning.Trainer) -> None:
    """Of the signals, and of a broadcast per batch that waits for the GPU (Lightning issue 21487)."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
