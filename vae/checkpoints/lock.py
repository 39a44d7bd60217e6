"""One process at a time in a directory."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae.errors import InputError

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
