"""The one error for a weight file, and writes that are whole or have not happened.

One process at a time in a directory."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from vae.errors import InputError

State = dict[str, Tensor]
LONGEST = 900  # characters of a message


class WeightsError(InputError):
    """A weight file cannot be used: names the file, what is wrong and what to do.

    Parts of it come out of that file: what is not printable is spelt out, what has no end is cut.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message[:LONGEST])
        super().__init__(shown if len(message) <= LONGEST else f"{shown}...")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes when it does not.

    What a killed process left half-written for `path` is removed first.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_the_dead(path)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise WeightsError(f"{path}: cannot be written ({reason}); what was there before is as it was") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_space(folder: Path, needed: int, path: Path) -> None:
    """Refuse to begin what cannot be finished: `needed` bytes in `folder`, to become `path`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f"{path}: needs {needed:,} bytes and {free:,} are free; make room or choose another folder")


def _forget_the_dead(path: Path) -> None:
    for old in path.parent.glob(".*.partial"):
        name, _, process = old.name.removesuffix(".partial").rpartition(".")
        if name == f".{path.name}" and process.isdecimal() and not _is_alive(int(process)):
            old.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold the directory for this process, which is `doing` something there: "training".

    The system lets go of it when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); choose another folder with output="
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                wrong = f"{folder}: its filesystem has no locks ({error.strerror}); choose another with output="
                raise InputError(wrong) from error
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{folder}: {holder} is {doing} there; wait for it, end it, or choose another name"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
