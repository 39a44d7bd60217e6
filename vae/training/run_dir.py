"""`SHA256SUMS` beside a run's checkpoints, as coreutils writes it (`sha256sum -c SHA256SUMS`): which of them are whole.

An entry is written before its checkpoint takes its name. So whatever moment a process is killed at, a checkpoint that
has its name has its entry.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

from vae.errors import InputError
from vae.files import write_text

MANIFEST = "SHA256SUMS"


def step_name(updates: int) -> str:
    return f"step_{updates:07d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """All that have their name, the newest first."""
    return sorted(folder.glob("step_*.ckpt"), reverse=True)


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is what was written, and a line on every newer one that is not."""
    known, damaged = read_manifest(folder), []
    for path in checkpoints_in(folder):
        wrong = what_is_wrong(path, known.get(path.name))
        if wrong is None:
            return path, damaged
        damaged.append(f"{path}: {wrong}")
    raise InputError(f"{folder}: no checkpoint to go on from ({'; '.join(damaged) or 'it holds none'})")


def what_is_wrong(path: Path, digest: str | None) -> str | None:
    """None where the file has this SHA-256."""
    if digest is None:
        return f"not in {MANIFEST}, so nothing says that it is whole"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == digest else f"damaged (its SHA-256 is {found[:12]}..., {MANIFEST} says {digest[:12]}...)"


def read_manifest(folder: Path) -> dict[str, str]:
    """{name of a checkpoint: its SHA-256}; empty where there is none."""
    path = folder / MANIFEST
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {name.strip(): digest for digest, _, name in (line.partition(" ") for line in lines)}


def record(folder: Path, name: str, digest: str) -> None:
    """Add one entry."""
    _write(folder, read_manifest(folder) | {name: digest})


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest checkpoints, and then their entries."""
    for old in checkpoints_in(folder)[count:]:
        old.unlink()
    _write(folder, {name: digest for name, digest in read_manifest(folder).items() if (folder / name).exists()})


def _write(folder: Path, entries: dict[str, str]) -> None:
    write_text(folder / MANIFEST, "".join(f"{entries[name]}  {name}\n" for name in sorted(entries)))


class HashingFile:
    """Passes on what is written to `file`, and knows its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None  # torch reports one of its own in its place

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
