"""Images in shards: tar archives as of WebDataset, or tables, near or far; any image is read without the others."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import xxhash

from vae.data.images import Encoded
from vae.data.limits import check_length
from vae.data.names import Computed
from vae.data.sources import Source
from vae.data.store import SCHEME, AbsentError, Store, base_name, from_remote
from vae.data.tables import rows_in, table_to_tar
from vae.data.tars import scan
from vae.errors import InputError

INDEX = "index.json"  # beside shards that `vae prepare` made: how many images each holds
TABLE = ".parquet"
OPEN_FILES = 16
READERS = 8
TRIES = 10  # to open a copy before another process removes it


class Archives:
    """Shards as local archives, the last `at_once` kept open; `column` is the one of images in tables."""

    def __init__(self, store: Store, at_once: int, column: str | None = None) -> None:
        self.store, self.at_once, self.column = store, at_once, column
        self._opened = lru_cache(maxsize=at_once)(self._open)

    def __reduce__(self) -> "tuple[type[Archives], tuple[Store, int, str | None]]":
        """In another process none is open."""
        return Archives, (self.store, self.at_once, self.column)

    def at(self, url: str) -> "_Archive":
        archive = self._opened(url)
        self.store.touch(archive.path)
        return archive

    def _open(self, url: str) -> "_Archive":
        for _ in range(TRIES):
            try:
                return _Archive(self._local(url), url)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise InputError(f"{url}: cannot be read ({error.strerror or error}); restore it") from error
        raise InputError(f"{url}: removed while it was read; restore it, or raise data.cache_gigabytes")

    def _local(self, url: str) -> Path:
        if not is_table(url):
            return self.store.local(url)
        return self.store.local(url, partial(table_to_tar, column=self.column), f"tar of {self.column}")


class Shards(Source):
    """`urls` are archives (.tar) and tables (.parquet), `counts` the images in each; empty ones are left out."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int], archives: Archives) -> None:
        kept = [(url, int(count)) for url, count in zip(urls, counts, strict=True) if count]
        self.urls, self.counts = [url for url, _ in kept], [count for _, count in kept]
        self.shards = self.counts
        self.archives = archives
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self.names = Computed(sum(self.counts), self.name)

    def place(self, index: int) -> tuple[int, int]:
        """(number of the shard, number within it)"""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def read(self, index: int) -> Encoded:
        shard, within = self.place(index)
        archive = self._archive(shard)
        check_length(archive.length(within), self.label(index))
        return archive.read(within)

    def label(self, index: int) -> str:
        shard, within = self.place(index)
        return f"{self.urls[shard]}: {self._archive(shard).members.names[within]}"

    def name(self, index: int) -> str:
        """ "shard/member" """
        shard, within = self.place(index)
        return f"{base_name(self.urls[shard])}/{self._archive(shard).members.names[within]}"

    def fingerprint(self) -> str:
        """Of the shards' names and how many images each has."""
        listed = json.dumps([list(map(base_name, self.urls)), self.shards])
        return xxhash.xxh3_128(listed.encode()).hexdigest()

    def part(self, chosen: Sequence[int]) -> "Shards":
        """These shards only."""
        return Shards([self.urls[shard] for shard in chosen], [self.counts[shard] for shard in chosen], self.archives)

    def _archive(self, shard: int) -> "_Archive":
        archive, expected = self.archives.at(self.urls[shard]), self.counts[shard]
        found = len(archive.members.names)
        if found != expected:
            wrong = f"{self.urls[shard]}: {found} images, expected {expected}"
            raise InputError(f"{wrong}; the shard is damaged or was changed: restore it, or make its index anew")
        return archive


def open_shards(
    urls: Sequence[str], store: Store, note: Callable[[str], None], column: str | None = None, at_once: int = OPEN_FILES
) -> Shards:
    """The images of shards, counted by the index beside them or else one by one; `note` is told what is damaged.

    `column` is the one of images in tables; the `at_once` shards used last are kept open.
    """
    archives = Archives(store, at_once, column)
    counts = _indexed(urls) or _counted(urls, archives, note)
    if not any(counts):
        raise InputError(f"{urls[0]}: no image in it or in any other of {len(urls)} shards; name others")
    return Shards(urls, counts, archives)


def is_table(url: str) -> bool:
    return base_name(url).endswith(TABLE)


class _Archive:
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


def _counted(urls: Sequence[str], archives: Archives, note: Callable[[str], None]) -> list[int]:
    """Several at a time, since most of it is waiting where they are far."""
    readers = ThreadPoolExecutor(READERS)
    try:
        found = list(readers.map(lambda url: _count(url, archives), urls))
    finally:
        readers.shutdown(cancel_futures=True)
    for _, problems in found:
        for problem in problems:
            note(problem)
    return [count for count, _ in found]


def _count(url: str, archives: Archives) -> tuple[int, list[str]]:
    if is_table(url):
        return rows_in(url), []
    members = archives.at(url).members
    return len(members.names), members.problems


def _indexed(urls: Sequence[str]) -> list[int] | None:
    """What the index beside the shards says, if there is one and it knows them all."""
    folders = {url.rpartition("/")[0] for url in urls}
    file = f"{folders.pop() or '.'}/{INDEX}"
    if folders or (SCHEME not in file and not Path(file).is_file()):
        return None
    try:
        entries = json.loads(from_remote(file, lambda stream: stream.read(), tries=1))["shards"]
        counts = {entry["name"]: int(entry["images"]) for entry in entries}
    except AbsentError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not an index of shards ({type(error).__name__}); remove it") from error
    return [counts[base_name(url)] for url in urls] if set(map(base_name, urls)) <= counts.keys() else None
