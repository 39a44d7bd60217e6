"""How a run ends early: on a signal, by the wall clock, or because another process is gone.

A run that is asked to stop finishes its update, saves, and says so by its exit status. A run that has lost a process
says which one and why, and does not wait for it.

Lightning's own signal handlers are kept out. On SIGTERM they exit with status 0 and no checkpoint, and with several
processes they broadcast from inside the handler, which hangs (Lightning issue 20806).
"""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import FrameType, TracebackType

import lightning
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from vae import distributed
from vae.console import warn
from vae.errors import BAD_IMAGES, PROCESS_LOST, TIME_IS_UP, Stopped
from vae.run_dir import RunDir
from vae.training.manifest import checkpoints_in

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """Note signals while entered. `status` is the status that the run should exit with, 0 while it should go on.

    Before `is_training` there is nothing to save, so a signal ends the process at once. So does a second SIGINT.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._signalled = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self.is_training = False
        self.has_bad_images = False

    @property
    def status(self) -> int:
        """The exit status that a signal, the deadline or bad images ask for, in this order; 0 for none."""
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        if self._signalled:
            return self._signalled
        if is_late:
            return TIME_IS_UP
        return BAD_IMAGES if self.has_bad_images else 0

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember it, or raise `Stopped` at once."""
        is_second_interrupt = number == signal.SIGINT and self._signalled == 128 + signal.SIGINT
        self._signalled = 128 + number
        if is_second_interrupt or not self.is_training:
            raise Stopped(self._signalled, f"{reason(self._signalled)}, at once")


def reason(status: int) -> str:
    """Return in words why a run ends with `status`."""
    if status == BAD_IMAGES:
        return "more images than data.max_corrupt allows cannot be read; skipped.jsonl lists them: stopped"
    return "max_minutes are over" if status == TIME_IS_UP else f"stopped by {signal.Signals(status - 128).name}"


def keep_lightning_out(trainer: lightning.Trainer) -> None:
    """Disable Lightning's signal handlers and its broadcast of SIGTERM.

    The broadcast happens at every batch and waits for the GPU (Lightning issue 21487).
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


POLL_SECONDS = 0.5
FAREWELL_SECONDS = 3.0  # for processes that agreed to stop; shorter than the period of Lightning's own watch
SIGNS_OF_A_LOST_PROCESS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def reporting_failures(trainer: lightning.Trainer, folder: Path, timeout_minutes: float) -> Iterator[None]:
    """Turn every early end into `Stopped`, with what happened and how to go on.

    Other processes that Lightning started are ended, since they would wait for this one.
    """
    watching = threading.Event()
    threading.Thread(target=_watch, args=(trainer, watching), daemon=True).start()

    try:
        yield
    except Stopped as stop:
        _end_children(trainer, patience=FAREWELL_SECONDS)
        raise _leave(trainer, folder, stop.code, stop.message) from stop
    except BaseException as error:
        _end_children(trainer)
        message = _in_words(error, timeout_minutes)
        if message is None:
            raise
        raise _leave(trainer, folder, PROCESS_LOST, message) from error
    finally:
        watching.set()


def _leave(trainer: lightning.Trainer, folder: Path, code: object, message: str) -> SystemExit:
    """Return the exception to leave with.

    Of the processes that Lightning started only the first prints a message and has a status. If a child had a
    status, Lightning would kill the first.
    """
    if isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment) and trainer.local_rank:
        return SystemExit(0 if code != PROCESS_LOST else PROCESS_LOST)
    remedy = f". Go on with: vae train resume={folder}" if checkpoints_in(RunDir(folder).checkpoints) else ""
    return Stopped(int(str(code)), f"{message}{remedy}")


def _in_words(error: BaseException, timeout_minutes: float) -> str | None:
    """Return which process was lost, in words, or None if the error is no sign of that."""
    if not isinstance(error, RuntimeError):
        return None

    text = re.sub(r"\[\S+\.cc:\d+\] ", "", " ".join(str(error).split()))  # drops the line of gloo's source
    if "DataLoader worker" in text:
        return f"a data worker died ({text[:200]}): most often memory ran out; lower data.workers or data.batch_size"

    is_lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS)
    if distributed.world_size() == 1 or not is_lost:
        return None
    return (
        f"process {dist.get_rank()} of {distributed.world_size()} lost another: it died, or was not heard of for "
        f"{timeout_minutes:g} minutes (timeout_minutes); its own last lines say more ({text[:200]})"
    )


def _watch(trainer: lightning.Trainer, is_over: threading.Event) -> None:
    """Print which child process died.

    Lightning kills the others without a message, and a collective on a GPU waits for ever.
    """
    while not is_over.wait(POLL_SECONDS):
        for number, child in enumerate(_children(trainer), start=1):
            if child.poll():
                warn(f"process {number} of the run (pid {child.pid}) ended with status {child.returncode}", "error")
                return


def _end_children(trainer: lightning.Trainer, patience: float = 0.0) -> None:
    """End the processes that Lightning started, after `patience` seconds for each.

    They would wait for this one. They are killed, since a process that is stopped reacts to no other signal.
    """
    for child in _children(trainer):
        with suppress(TimeoutExpired):
            child.wait(patience)
        child.kill()
        child.wait()


def _children(trainer: lightning.Trainer) -> list["Popen[bytes]"]:
    """Return the processes that Lightning started, on the first process of a machine."""
    return getattr(trainer.strategy.launcher, "procs", [])
