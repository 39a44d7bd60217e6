"""Shards as archives that are read in place: fetched, or made of a table, and kept open while they are in use."""

import os
from functools import lru_cache, partial
from pathlib import Path

from vae.data.store import Store, base_name
from vae.data.tables import table_to_tar
from vae.data.tars import scan
from vae.errors import InputError

TABLE = ".parquet"
TRIES = 10  # to open a copy before another process removes it


class Archives:
    """Shards as local archives, the last `at_once` kept open; `column` is the one of images in tables."""

    def __init__(self, store: Store, at_once: int, column: str | None = None) -> None:
        self.store, self.at_once, self.column = store, at_once, column
        self._opened = lru_cache(maxsize=at_once)(self._open)

    def __reduce__(self) -> "tuple[type[Archives], tuple[Store, int, str | None]]":
        """In another process none is open."""
        return Archives, (self.store, self.at_once, self.column)

    def at(self, url: str) -> "Archive":
        archive = self._opened(url)
        self.store.touch(archive.path)
        return archive

    def _open(self, url: str) -> "Archive":
        for _ in range(TRIES):
            try:
                return Archive(self._local(url), url)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise InputError(f"{url}: cannot be read ({error.strerror or error}); restore it") from error
        raise InputError(f"{url}: removed while it was read; restore it, or raise data.cache_gigabytes")

    def _local(self, url: str) -> Path:
        if not is_table(url):
            return self.store.local(url)
        return self.store.local(url, partial(table_to_tar, column=self.column), f"tar of {self.column}")


def is_table(url: str) -> bool:
    return base_name(url).endswith(TABLE)


class Archive:
    """Open, so that it can be read also when it is removed."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.number = path, os.open(path, os.O_RDONLY)
        self.members = scan(path, url)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def length(self, index: int) -> int:
        return int(self.members.lengths[index])

    def read(self, index: int) -> bytes:
        return os.pread(self.number, self.length(index), int(self.members.offsets[index]))
