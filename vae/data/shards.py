"""Images in shards: tar archives as of WebDataset, or tables, near or far; any image is read without the others."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from vae.data.archives import Archive, Archives, is_table
from vae.data.images import Encoded
from vae.data.limits import check_length
from vae.data.names import Computed
from vae.data.sources import Source
from vae.data.store import SCHEME, AbsentError, Store, base_name, from_remote
from vae.data.tables import rows_in
from vae.errors import InputError

INDEX = "index.json"  # beside shards that `vae prepare` made: how many images each holds
DROPPED = "dropped.jsonl"  # and which were left out
OPEN_FILES = 16
READERS = 8


class Counted(NamedTuple):
    """A shard: where it is, what it is called, its images, and a mark that is another one when they are others."""

    url: str
    title: str
    images: int
    mark: str


class Shards(Source):
    """The shards `found`: archives (.tar) and tables (.parquet). Empty ones are left out."""

    def __init__(self, found: Sequence[Counted], archives: Archives) -> None:
        self.found = [shard for shard in found if shard.images]
        self.urls, self.counts = [shard.url for shard in self.found], [shard.images for shard in self.found]
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
        return f"{self.found[shard].title}/{self._archive(shard).members.names[within]}"

    def fingerprint(self) -> str:
        """Of the shards' names and of what each holds, wherever they lie."""
        listed = json.dumps([[shard.title, shard.images, shard.mark] for shard in self.found])
        return xxhash.xxh3_128(listed.encode()).hexdigest()

    def part(self, chosen: Sequence[int]) -> "Shards":
        """These shards only."""
        return Shards([self.found[shard] for shard in chosen], self.archives)

    @property
    def is_local(self) -> bool:
        return not any(SCHEME in url or is_table(url) for url in self.urls)

    def _archive(self, shard: int) -> Archive:
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
    if not any(images for images, _ in counts):
        raise InputError(f"{urls[0]}: no image in it or in any other of {len(urls)} shards; name others")
    found = [Counted(url, title, *count) for url, title, count in zip(urls, _titles(urls), counts, strict=True)]
    return Shards(found, archives)


def _titles(urls: Sequence[str]) -> list[str]:
    """File names, or, where two are the same, the paths below what all have in common."""
    names = list(map(base_name, urls))
    if len(set(names)) == len(names):
        return names
    common = os.path.commonprefix(list(urls)).rpartition("/")[0]  # noqa: RUF071  (of URLs too)
    return [url.removeprefix(f"{common}/") for url in urls]


def _counted(urls: Sequence[str], archives: Archives, note: Callable[[str], None]) -> list[tuple[int, str]]:
    """Several at a time, since most of it is waiting where they are far."""
    readers = ThreadPoolExecutor(READERS)
    try:
        found = list(readers.map(lambda url: _count(url, archives), urls))
    finally:
        readers.shutdown(cancel_futures=True)
    for *_, problems in found:
        for problem in problems:
            note(problem)
    return [(images, mark) for images, mark, _ in found]


def _count(url: str, archives: Archives) -> tuple[int, str, list[str]]:
    if is_table(url):
        return *rows_in(url), []
    members = archives.at(url).members
    mark = xxhash.xxh3_64_hexdigest(members.names.fingerprint().encode() + members.lengths.tobytes())
    return len(members.names), mark, members.problems


def _indexed(urls: Sequence[str]) -> list[tuple[int, str]] | None:
    """What the index beside the shards says, if there is one and it knows them all."""
    folders = {url.rpartition("/")[0] for url in urls}
    file = f"{folders.pop() or '.'}/{INDEX}"
    if folders or (SCHEME not in file and not Path(file).is_file()):
        return None
    try:
        entries = json.loads(from_remote(file, lambda stream: stream.read(), tries=1))["shards"]
        counts = {entry["name"]: (int(entry["images"]), str(entry.get("sha256", ""))) for entry in entries}
    except AbsentError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not an index of shards ({type(error).__name__}); remove it") from error
    return [counts[base_name(url)] for url in urls] if set(map(base_name, urls)) <= counts.keys() else None
