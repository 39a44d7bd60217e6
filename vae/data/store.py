"""Files that are somewhere else, through fsspec: kept in a local folder of bounded size while they are needed."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import fsspec
import xxhash

from vae.errors import InputError

TRIES, WAIT_SECONDS = 4, 2.0  # the wait doubles from one try to the next
SCHEME = "://"


class Store:
    """Local copies in `folder`, of at most `gigabytes` in all: the least recently used go first.

    Processes may share the folder; each file is fetched by one of them.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self.folder, self.limit = Path(folder).expanduser(), gigabytes * 1e9

    def local(self, url: str, convert: Callable[[Path, Path], None] | None = None) -> Path:
        """A path with what is at `url`, which is a URL or a path; of another form where `convert(from, to)` says so."""
        if SCHEME not in url and convert is None:
            return Path(url)
        copy = self.folder / f"{xxhash.xxh3_64_hexdigest(url.encode())}-{url.rpartition('/')[2]}"
        if not copy.exists():
            with _one_at_a_time(copy.with_name(f".{copy.name}.lock")):
                if not copy.exists():
                    self._make(url, copy, convert)
        with suppress(OSError):
            os.utime(copy)
        return copy

    def _make(self, url: str, copy: Path, convert: Callable[[Path, Path], None] | None) -> None:
        fetched, partial = copy.with_name(f".{copy.name}.fetched"), copy.with_name(f".{copy.name}.partial")
        try:
            if SCHEME in url:
                _fetch(url, fetched)
            source = fetched if SCHEME in url else Path(url)
            if convert is not None:
                convert(source, partial)
            else:
                source.replace(partial)
            partial.replace(copy)
        except OSError as error:
            raise InputError(f"{url}: cannot be kept in {self.folder} ({error.strerror or error})") from error
        finally:
            for left in (fetched, partial):
                left.unlink(missing_ok=True)
        self._make_room(copy)

    def _make_room(self, newest: Path) -> None:
        files = [(file.stat(), file) for file in self.folder.glob("[!.]*")]
        excess = sum(status.st_size for status, _ in files) - self.limit
        for status, file in sorted(files, key=lambda pair: pair[0].st_mtime):
            if excess <= 0 or file == newest:
                return
            file.unlink(missing_ok=True)  # who reads it keeps it open
            excess -= status.st_size


def expand(pattern: str, key: str) -> list[str]:
    """The files that a brace pattern, a glob, or both mean, local or remote; `key` is what an error calls it."""
    from braceexpand import braceexpand

    if pattern.lstrip().startswith("pipe:"):
        raise InputError(f"{key}={pattern!r}: commands are not run; name files, or URLs that fsspec opens")
    urls: list[str] = []
    for one in braceexpand(str(Path(pattern).expanduser()) if SCHEME not in pattern else pattern):
        urls += sorted(_matching(one, key)) if any(letter in one for letter in "*?[") else [one]
    missing = next((url for url in urls if SCHEME not in url and not Path(url).is_file()), None)
    if missing or not urls:
        raise InputError(f"{key}={pattern!r}: {missing or 'nothing'} is not there; name existing shards")
    return urls


def open_remote(url: str) -> AbstractContextManager[BinaryIO]:
    return fsspec.open(url, "rb")  # pyright: ignore[reportReturnType]


def _matching(pattern: str, key: str) -> list[str]:
    try:
        filesystem, _, _ = fsspec.get_fs_token_paths(pattern)
        found = filesystem.glob(pattern)
    except Exception as error:  # every filesystem has its own
        raise InputError(f"{key}={pattern!r}: cannot be listed ({type(error).__name__}: {error})") from error
    return [filesystem.unstrip_protocol(name) if SCHEME in pattern else name for name in map(str, found)]


def _fetch(url: str, target: Path) -> None:
    for attempt in range(TRIES):
        try:
            with open_remote(url) as remote, target.open("wb") as file:
                shutil.copyfileobj(remote, file, 1 << 20)
            return
        except Exception as error:  # every filesystem has its own
            if attempt == TRIES - 1 or isinstance(
                error, FileNotFoundError | PermissionError | ImportError | ValueError
            ):
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise InputError(f"{url}: cannot be fetched ({reason}); check the address and the network") from error
            time.sleep(WAIT_SECONDS * 2**attempt)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
