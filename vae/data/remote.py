"""Remote files through fsspec, kept in a local folder of bounded size while they are needed."""

import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
import xxhash

from vae.errors import InputError

TRIES, WAIT_SECONDS = 4, 2.0  # the wait doubles with each try
HOPELESS = (FileNotFoundError, PermissionError, ImportError, ValueError)  # causes that another try does not cure
REFUSED = {401, 403, 404}  # statuses of HTTP that another try does not cure
ABANDONED_SECONDS = 3600.0  # without a byte written: the process that fetched it was killed
SCHEME = "://"

Result = TypeVar("Result")
Convert = Callable[[Path, Path], None]


class AbsentError(InputError):
    """What is at a URL is not there, or we may not read it."""


class Store:
    """Local copies in `folder`, of at most `gigabytes` in all. The least recently used are removed first.

    Processes may share the folder. Each file is fetched by one of them.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = gigabytes * 1e9

    def local(self, url: str, convert: Convert | None = None, form: str = "") -> Path:
        """Return a path with what is at `url`, a URL or a path.

        Where `convert(from, to)` is given, the copy is what it writes, and `form` names that. Another process may
        remove the copy at any time, but a process that has opened it can read it to its end.
        """
        if SCHEME not in url and convert is None:
            return Path(url)

        try:
            copy = self._copy_of(url, form)
            if not copy.exists():
                with _one_at_a_time(copy.with_name(f".{copy.name}.lock")):
                    if not copy.exists():  # another process may have made it meanwhile
                        self._make(url, copy, convert)
        except OSError as error:
            wrong = f"{url}: cannot be kept in {self.folder} ({error.strerror or error})"
            raise InputError(f"{wrong}; see to it, or name another folder by data.cache") from error

        self.touch(copy)
        return copy

    def touch(self, path: Path) -> None:
        """Note that a copy is in use. Files outside the store are left as they are."""
        if path.parent == self.folder:
            with suppress(OSError):
                _use(path)

    def _copy_of(self, url: str, form: str) -> Path:
        """Return the path of a copy. A local file that has changed gets another one."""
        source = url
        if SCHEME not in url:
            status = Path(url).stat()
            source = f"{Path(url).absolute()} {status.st_size} {status.st_mtime_ns}"
        return self.folder / f"{xxhash.xxh3_128_hexdigest(os.fsencode(f'{source} {form}'))}-{base_name(url)[-40:]}"

    def _make(self, url: str, copy: Path, convert: Convert | None) -> None:
        """Fetch and convert what is at `url`, under other names until it is complete."""
        fetched, partial = copy.with_name(f".{copy.name}.fetched"), copy.with_name(f".{copy.name}.partial")

        try:
            if SCHEME in url:
                from_remote(url, lambda stream: _write(stream, fetched))
            source = fetched if SCHEME in url else Path(url)
            if convert is not None:
                convert(source, partial)
            else:
                source.replace(partial)
            _use(partial)
            partial.replace(copy)
        finally:
            for left in (fetched, partial):
                left.unlink(missing_ok=True)

        self._make_room(copy)

    def _make_room(self, newest: Path) -> None:
        """Remove what killed processes left, and the least recently used copies beyond the limit."""
        files = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process makes room too
                files.append((file.stat(), file))

        for status, file in files:
            if file.suffix in (".fetched", ".partial") and time.time() - status.st_mtime > ABANDONED_SECONDS:
                file.unlink(missing_ok=True)

        copies = [(status, file) for status, file in files if not file.name.startswith(".")]
        excess = sum(status.st_size for status, _ in copies) - self.limit
        for status, file in sorted(copies, key=lambda pair: pair[0].st_mtime_ns):
            if excess > 0 and file != newest:
                file.unlink(missing_ok=True)  # a process that reads it keeps it open
                excess -= status.st_size


def _use(path: Path) -> None:
    """Set a file's time to now, by a clock that is finer than the file system's own."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def from_remote(url: str, use: Callable[[BinaryIO], Result], tries: int = TRIES) -> Result:
    """Return what `use` makes of the bytes at `url`.

    After an error of the network it is called again, with the bytes from their beginning. Raises AbsentError where
    another try would not help, and InputError after the last one.
    """
    for attempt in range(tries):
        try:
            with fsspec.open(url, "rb") as stream:  # pyright: ignore[reportGeneralTypeIssues]
                return use(stream)  # pyright: ignore[reportArgumentType]
        except InputError:
            raise
        except Exception as error:  # every filesystem has its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise

            causes = _causes(error)
            is_lasting = isinstance(causes[-1], HOPELESS) or any(getattr(c, "status", 0) in REFUSED for c in causes)
            if is_lasting or attempt == tries - 1:
                kind = AbsentError if is_lasting or isinstance(error, HOPELESS) else InputError
                raise kind(f"{url}: cannot be fetched ({_told(error)}); check the address and the network") from error
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError


def expand(pattern: str, key: str) -> list[str]:
    """List the files, local or remote, that a brace pattern, a glob, or both mean.

    `key` is what an error calls the pattern. Raises InputError where nothing matches or a file is not there.
    """
    from braceexpand import braceexpand

    given = f"{key}={pattern!r}"
    if pattern.lstrip().startswith("pipe:"):
        raise InputError(f"{given}: commands are not run; name files, or URLs that fsspec opens")

    local = str(Path(pattern).expanduser())
    if SCHEME not in pattern and Path(local).is_file():
        return [local]

    try:
        parts = list(braceexpand(pattern if SCHEME in pattern else local))
    except ValueError as error:
        raise InputError(f"{given}: its braces do not match; write {{000..099}}") from error

    urls = [url for part in parts for url in _matching(part, given)]
    missing = next((url for url in urls if SCHEME not in url and not Path(url).is_file()), None)
    if missing or not urls:
        wrong = (
            f"{missing} is {'a folder' if Path(missing).is_dir() else 'not there'}" if missing else "nothing matches"
        )
        raise InputError(f"{given}: {wrong}; name existing shards, as 'shards/*.tar' or 'shards/{{000..099}}.tar'")

    return urls


def base_name(url: str) -> str:
    """Return the name of the file, without a URL's query."""
    path = url.partition("?")[0] if SCHEME in url else url
    return path.rpartition("/")[2]


def _matching(pattern: str, given: str) -> list[str]:
    """List the files that one pattern without braces means."""
    if SCHEME not in pattern:
        return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
    if not any(letter in pattern.partition("?")[0] for letter in "*["):
        return [pattern]

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        names = [str(name) for name in filesystem.glob(path)]
        return sorted(filesystem.unstrip_protocol(name) for name in names if not base_name(name).startswith("."))
    except Exception as error:  # every filesystem has its own
        raise InputError(f"{given}: cannot be listed ({_told(error)}); name the shards one by one") from error


def _causes(error: BaseException) -> list[BaseException]:
    """List the error and what it was raised from.

    The cause matters, because fsspec raises `FileNotFoundError` for a server out of reach too.
    """
    return [error, *(_causes(error.__cause__) if error.__cause__ else [])]


def _told(error: Exception) -> str:
    """Describe the first cause of an error."""
    cause = _causes(error)[-1]
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


def _write(stream: BinaryIO, target: Path) -> None:
    """Write a stream to a file, in pieces."""
    with target.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file within the block."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
