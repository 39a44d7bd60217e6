"""Files on disk: the error for weight files, atomic writes, and the lock on a directory.

A write either replaces the whole file or leaves the old one as it was. A lock lets one process at a time work in a
directory.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from vae.errors import InputError, printable

State = dict[str, Tensor]
LONGEST = 900  # characters of a message that are shown


class WeightsError(InputError):
    """A weight file cannot be used. The message names the file, what is wrong, and the remedy.

    Parts of the message can come from that file, so characters that are not printable are escaped, and a long message
    is cut.
    """

    def __init__(self, message: str) -> None:
        shown = printable(message[:LONGEST])
        super().__init__(shown if len(message) <= LONGEST else f"{shown}...")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, which replaces `path` when the block ends without an error.

    The sibling is deleted if the block fails. Files that a killed process left half-written for `path` are removed
    first. Missing parent folders are made. Raises WeightsError where the file system refuses; `path` is then unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_the_dead(path)
        yield partial

        # The contents reach the disk before the name does: after a power failure `path` is the old file or the new one.
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
    """Write `text` to `path` as UTF-8, atomically. Raises WeightsError where that fails."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_space(folder: Path, needed: int, path: Path) -> None:
    """Raise WeightsError unless `folder` has `needed` bytes free for the file that becomes `path`.

    A write that cannot be finished is refused before it begins.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f"{path}: needs {needed:,} bytes and {free:,} are free; make room or choose another folder")


def _forget_the_dead(path: Path) -> None:
    """Remove temporary files for `path` whose process has ended."""
    for old in path.parent.glob(".*.partial"):
        name, _, process = old.name.removesuffix(".partial").rpartition(".")
        if name == f".{path.name}" and process.isdecimal() and not _is_alive(int(process)):
            old.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Return whether a process with this id exists, of any user."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold the lock on `folder` for this process while the block runs. Missing folders are made.

    `doing` is what the process does there, for the error of the next one: "training". The operating system releases the
    lock when the process ends, however it ends. Raises InputError where another process holds the lock, where the
    folder cannot be written, and where the file system has no locks.
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
        # The holder writes its name into the lock file, where the error above reads it.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
