"""When a process that a run needs is gone: in words, and without waiting for it."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import lightning
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from vae.errors import PROCESS_LOST, Stopped
from vae.training import ranks
from vae.training.console import warn
from vae.training.manifest import checkpoints_in

POLL_SECONDS = 0.5
FAREWELL_SECONDS = 3.0  # for processes that stop by agreement; below the period of Lightning's own watch
SIGNS_OF_A_LOST_PROCESS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def told(trainer: lightning.Trainer, folder: Path, timeout_minutes: float) -> Iterator[None]:
    """Every early end as `Stopped`, with what happened and how to go on."""
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
    """Of the processes that Lightning started only the first speaks and has a status: a child's would get it killed."""
    if isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment) and trainer.local_rank:
        return SystemExit(0 if code != PROCESS_LOST else PROCESS_LOST)
    remedy = f". Go on with: python train.py resume={folder}" if checkpoints_in(folder / "checkpoints") else ""
    return Stopped(int(str(code)), f"{message}{remedy}")


def _in_words(error: BaseException, timeout_minutes: float) -> str | None:
    """None where it is no sign of a process that is gone."""
    if not isinstance(error, RuntimeError):
        return None
    text = re.sub(r"\[\S+\.cc:\d+\] ", "", " ".join(str(error).split()))  # where in gloo is not the user's
    if "DataLoader worker" in text:
        return f"a data worker died ({text[:200]}): most often memory ran out; lower data.workers or data.batch_size"
    is_lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS)
    if ranks.count() == 1 or not is_lost:
        return None
    return (
        f"process {dist.get_rank()} of {ranks.count()} lost another: it died, or was not heard of for "
        f"{timeout_minutes:g} minutes (timeout_minutes); its own last lines say more ({text[:200]})"
    )


def _watch(trainer: lightning.Trainer, is_over: threading.Event) -> None:
    """Say which child process died: Lightning kills the others without a word, a GPU's collective waits for ever."""
    while not is_over.wait(POLL_SECONDS):
        for number, child in enumerate(_children(trainer), start=1):
            if child.poll():
                warn(f"error: process {number} of the run (pid {child.pid}) ended with status {child.returncode}")
                return


def _end_children(trainer: lightning.Trainer, patience: float = 0.0) -> None:
    """Those that Lightning started, which would wait for this one; also one that is stopped and hears nothing else."""
    for child in _children(trainer):
        with suppress(TimeoutExpired):
            child.wait(patience)
        child.kill()
        child.wait()


def _children(trainer: lightning.Trainer) -> list["Popen[bytes]"]:
    return getattr(trainer.strategy.launcher, "procs", [])
