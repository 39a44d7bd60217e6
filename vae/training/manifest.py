"""The checkpoint files of a run and `SHA256SUMS` beside them, which shows which of them are whole.

The manifest has the format of coreutils (`sha256sum -c SHA256SUMS`). An entry is written before its checkpoint takes
its name. So whenever a process is killed, a checkpoint that has its name has its entry.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from vae.errors import InputError
from vae.files import write_text

MANIFEST = "SHA256SUMS"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints that have their final name, the newest first."""
    return sorted(folder.glob("step_*.ckpt"), reverse=True)


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest checkpoint that is as it was written, and one line on every newer one that is not.

    Raises InputError if there is none.
    """
    known = read_manifest(folder)
    damaged = []
    for path in checkpoints_in(folder):
        wrong = what_is_wrong(path, known.get(path.name))
        if wrong is None:
            return path, damaged
        damaged.append(f"{path}: {wrong}")
    raise InputError(f"{folder}: no checkpoint to go on from ({'; '.join(damaged) or 'it holds none'})")


def what_is_wrong(path: Path, digest: str | None) -> str | None:
    """Return why the file does not have this SHA-256, or None if it has."""
    if digest is None:
        return f"not in {MANIFEST}, so nothing says that it is whole"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == digest else f"damaged (its SHA-256 is {found[:12]}..., {MANIFEST} says {digest[:12]}...)"


def read_manifest(folder: Path) -> dict[str, str]:
    """Return {name of a checkpoint: its SHA-256}; empty if there is no manifest."""
    path = folder / MANIFEST
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {name.strip(): digest for digest, _, name in (line.partition(" ") for line in lines)}


def record(folder: Path, name: str, digest: str) -> None:
    """Add one entry to the manifest."""
    _write(folder, read_manifest(folder) | {name: digest})


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints, and then their entries."""
    for old in checkpoints_in(folder)[count:]:
        old.unlink()
    _write(folder, {name: digest for name, digest in read_manifest(folder).items() if (folder / name).exists()})


def _write(folder: Path, entries: dict[str, str]) -> None:
    """Write the manifest, sorted by name."""
    write_text(folder / MANIFEST, "".join(f"{entries[name]}  {name}\n" for name in sorted(entries)))


class HashingFile:
    """Pass what is written on to `file`, and compute its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None  # kept, since torch raises an error of its own instead

    def write(self, data: bytes) -> int:
        """Write `data` and return how many bytes were written. An error is also kept in `error`."""
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was written."""
        return self._hash.hexdigest()
