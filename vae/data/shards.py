"""Images in shards: tar archives as of WebDataset, or tables, near or far; any image is read without the others."""

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from vae.data.images import Encoded
from vae.data.sources import Source
from vae.data.store import SCHEME, Store, open_remote
from vae.data.tables import rows_in, table_to_tar
from vae.data.tars import Members, scan
from vae.errors import InputError

INDEX = "index.json"  # beside shards that `vae prepare` made: how many images each holds
OPEN_FILES = 64
TABLE = ".parquet"


class Shards(Source):
    """`urls` are archives (.tar) and tables (.parquet), `counts` the images in each; empty ones are left out."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int], store: Store) -> None:
        kept = [(url, int(count)) for url, count in zip(urls, counts, strict=True) if count]
        self.urls, self.counts = [url for url, _ in kept], [count for _, count in kept]
        self.shards = self.counts
        self.store = store
        self.names = _Named(self)
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> tuple[int, int]:
        """(number of the shard, number within it)"""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def read(self, index: int) -> Encoded:
        shard, within = self.place(index)
        members = self._members(shard)
        file = _opened(local_shard(self.urls[shard], self.store))
        return os.pread(file.number, int(members.lengths[within]), int(members.offsets[within]))

    def label(self, index: int) -> str:
        shard, within = self.place(index)
        return f"{self.urls[shard]}: {self._members(shard).names[within]}"

    def name(self, index: int) -> str:
        """ "shard/member" """
        shard, within = self.place(index)
        return f"{_base(self.urls[shard])}/{self._members(shard).names[within]}"

    def fingerprint(self) -> str:
        listed = json.dumps([list(map(_base, self.urls)), self.shards])
        return xxhash.xxh3_128(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def part(self, chosen: Sequence[int]) -> "Shards":
        """These shards only."""
        return Shards([self.urls[shard] for shard in chosen], [self.counts[shard] for shard in chosen], self.store)

    def _members(self, shard: int) -> Members:
        members = _scanned(local_shard(self.urls[shard], self.store))
        if len(members.names) != self.counts[shard]:
            wrong = f"{self.urls[shard]}: {len(members.names)} images, expected {self.counts[shard]}"
            raise InputError(f"{wrong}; the shard is damaged or was changed: restore it, or make its index anew")
        return members


class _Named(Sequence[str]):
    """The names of all, from the shards as they are asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._shards.name(index)


def open_shards(urls: Sequence[str], store: Store, note: Callable[[str], None]) -> Shards:
    """The images of shards, counted by the index beside them or else one by one; `note` is told what is damaged."""
    counts = _indexed(urls) or [_count(url, store, note) for url in urls]
    return Shards(urls, counts, store)


def local_shard(url: str, store: Store) -> Path:
    """The shard as a local archive."""
    return store.local(url, table_to_tar if url.endswith(TABLE) else None)


def _count(url: str, store: Store, note: Callable[[str], None]) -> int:
    if url.endswith(TABLE):
        return rows_in(url)
    members = _scanned(local_shard(url, store))
    for problem in members.problems:
        note(problem)
    return len(members.names)


def _indexed(urls: Sequence[str]) -> list[int] | None:
    """What the index beside the shards says, if there is one and it knows them all."""
    folders = {url.rpartition("/")[0] for url in urls}
    file = f"{folders.pop() or '.'}/{INDEX}"
    if folders or (SCHEME not in file and not Path(file).is_file()):
        return None
    try:
        with open_remote(file) as stream:
            counts = {entry["name"]: int(entry["images"]) for entry in json.load(stream)["shards"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not an index of shards ({type(error).__name__}); remove it") from error
    return [counts[_base(url)] for url in urls] if set(map(_base, urls)) <= counts.keys() else None


def _base(url: str) -> str:
    return url.rpartition("/")[2]


@lru_cache(maxsize=OPEN_FILES)
def _scanned(path: Path) -> Members:
    return scan(path)


class _OpenFile:
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path) -> _OpenFile:
    """Kept open: a copy that is no longer kept can still be read to its end."""
    return _OpenFile(path)
