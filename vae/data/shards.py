"""Images in shards: tar archives as of WebDataset, or Parquet tables, near or far.

Any image is read without the others. Remote shards are fetched, and tables, as the hub holds them, are made into tar
archives. Archives are read in place and kept open while they are in use; nothing is ever extracted. The headers of
archives are read here, because made-up ones can keep Python's `tarfile` busy for ever (CVE-2024-6232, CVE-2025-8194).
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vae.data.decode import EXTENSIONS, Encoded, check_length
from vae.data.remote import SCHEME, AbsentError, Store, base_name, from_remote
from vae.data.sources import Computed, Names, Source
from vae.errors import InputError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes of a member's extended header, which has names too long for a block
PADDING = 1 << 16  # bytes of zeros that may follow the last member
REGULAR, WITHOUT_DATA, LONG_NAME, EXTENDED, FOR_LATER = b"\x0007", b"123456", b"L", b"x", b"Kg"  # kinds of members


class Members(NamedTuple):
    """The images of one archive: names, where their bytes begin, how many they are; and problems with the rest."""

    names: Names
    offsets: np.ndarray
    lengths: np.ndarray
    problems: list[str]


class _DamageError(Exception):
    """An archive is damaged from some place on."""


def scan(path: Path, label: str | None = None) -> Members:
    """List the regular files with an image's extension in a tar archive.

    Links, devices and anything else in it are passed over. Of two members with one name the first counts. Where the
    archive is damaged, the images before that place are kept, and `problems` says so. Errors call the archive `label`.
    Raises InputError where it is compressed, and where no image is left.
    """
    label = label or str(path)
    found: dict[bytes, tuple[int, int]] = {}
    repeated: list[bytes] = []
    problems: list[str] = []

    with path.open("rb") as file:
        _check_plain(file.read(BLOCK), label)
        try:
            for name, *place in _files(file.fileno()):
                if not _is_image(name):
                    continue
                if name in found:
                    repeated.append(name)
                found.setdefault(name, (place[0], place[1]))
        except _DamageError as error:
            problems.append(f"{label}: damaged after {len(found)} images ({error}); these are used, the rest is lost")

    if repeated:
        example = ascii(os.fsdecode(repeated[0]))[:200]
        problems.append(f"{label}: {len(repeated)} members have the name of another, as {example}; the first is used")

    if not found:
        raise InputError(f"{problems[0] if problems else f'{label}: no image in it'}; replace or remove it")

    places = np.array(list(found.values()), dtype=np.int64)
    return Members(Names(found), places[:, 0], places[:, 1], problems)


def _files(file: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, where its bytes begin, how many they are) of each regular member."""
    size = os.fstat(file).st_size
    at = 0
    known: dict[bytes, bytes] = {}  # what extended headers say of the next member

    while any(header := os.pread(file, BLOCK, at)):
        length = _length(header, known, at)
        kind = header[156:157]
        start = at + BLOCK

        if start + length > size:
            raise _DamageError(f"the member at {at} goes on behind the end, {size}")

        if kind in LONG_NAME + EXTENDED:
            known |= _extended(file, start, length, kind)
        elif kind not in FOR_LATER:
            # Long link names (K) and global headers (g) do not end what is known of the next member. This one does.
            is_sparse = any(key.startswith(b"GNU.sparse") for key in known)
            if kind in REGULAR and not is_sparse:
                yield known.get(b"path") or _own_name(header), start, length
            known = {}

        at = start + -(-length // BLOCK) * BLOCK

    if at >= size:
        raise _DamageError(f"it breaks off at the end, {size}")
    if at + PADDING < size:
        raise _DamageError(f"it ends at {at} of {size} bytes")


def _length(header: bytes, known: dict[bytes, bytes], at: int) -> int:
    """Return the number of a member's bytes. Raise _DamageError where the bytes are no header."""
    try:
        total = _number(header[148:156])
        length = int(known[b"size"]) if b"size" in known else _number(header[124:136])
    except ValueError:
        total = length = -1

    # The checksum is that of the header with spaces in its own place.
    if len(header) < BLOCK or length < 0 or total != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _DamageError(f"no member's header at {at}")
    return 0 if header[156:157] in WITHOUT_DATA else length


def _number(field: bytes) -> int:
    """Read a number from a header: octal digits, or binary where it is large."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _own_name(header: bytes) -> bytes:
    """Return the name that a header itself holds."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _extended(file: int, start: int, length: int, kind: bytes) -> dict[bytes, bytes]:
    r"""Read an extended header: GNU's long name, or the records "<length of the record> <key>=<value>\n" of pax."""
    if length > LONGEST_HEADER:
        raise _DamageError(f"an extended header of {length} bytes at {start}")

    data = os.pread(file, length, start)
    if kind == LONG_NAME:
        return {b"path": data.partition(b"\0")[0]}

    records: dict[bytes, bytes] = {}
    at = 0
    while at < length and data[at]:
        digits = data[at : at + 20].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, is_record, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not at < end <= length or not is_record:
            raise _DamageError(f"no record of an extended header at {start + at}")
        records[key] = value
        at = end

    return records


def _check_plain(start: bytes, label: str) -> None:
    """Raise InputError where an archive is compressed, by its first bytes."""
    for signature, kind in COMPRESSED.items():
        if start.startswith(signature):
            raise InputError(f"{label}: compressed with {kind}, so it cannot be read in place; decompress it once")


def _is_image(name: bytes) -> bool:
    """Say whether a member's name is that of an image, and not hidden."""
    base = os.fsdecode(name).rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in EXTENSIONS and not base.startswith(".")  # noqa: PTH122  (by millions)


ROWS = 64  # rows of a table that are read at a time


def rows_in(url: str) -> tuple[int, str]:
    """Return the number of a table's rows, and a mark of their sizes, from the end of the file alone."""

    def rows(stream: Any) -> tuple[int, str]:
        try:
            about = pq.ParquetFile(stream).metadata
            sizes = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
            return about.num_rows, xxhash.xxh3_64_hexdigest(repr(sizes).encode())
        except pa.ArrowInvalid as error:
            raise _damaged(url, error) from error

    return from_remote(url, rows)


def table_to_tar(table: Path, archive: Path, column: str | None = None) -> None:
    """Write the images of a table as a tar archive: one member a row, called by its number.

    A row without an image becomes an empty file, which is no image. Raises InputError where no row has an image.
    """
    is_there = False
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, data in enumerate(_images(table, column)):
            add_member(tar, f"{number:08d}.jpg", data)
            is_there |= bool(data)

    if not is_there:
        raise InputError(f"{table}: no images in its rows, or only paths of some; write the table with embedded images")


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive. It is the same bytes whoever writes it, and whenever."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def image_column(schema: Any, wanted: str | None, given: str) -> str:
    """Return the column of images: of bytes, or of a struct with a field `bytes`, as `datasets` writes images.

    `wanted` names it where there are several. Raises InputError, which calls the table `given`.
    """
    structs, others = [], []

    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            structs.append(field.name)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            others.append(field.name)

    if wanted is not None and wanted in structs + others:
        return wanted
    found = structs or others
    if wanted is None and len(found) == 1:
        return found[0]

    told = f"{wanted!r} is no column of images" if wanted is not None else f"{len(found)} columns of images"
    raise InputError(f"{given}: {told}, its columns are {', '.join(schema.names)}; name one by data.column")


def _images(table: Path, wanted: str | None) -> Iterator[bytes]:
    """Yield the bytes of each row's image, empty where there is none."""
    try:
        file = pq.ParquetFile(table)
        column = image_column(file.schema_arrow, wanted, str(table))
        for batch in file.iter_batches(ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield (value if isinstance(value, bytes) else (value or {}).get("bytes")) or b""
    except (pa.ArrowException, OSError) as error:
        raise _damaged(str(table), error) from error


def _damaged(table: str, error: Exception) -> InputError:
    """Make the error for a table that cannot be read."""
    return InputError(f"{table}: not readable as parquet ({' '.join(str(error).split())[:200]}); replace it")


TABLE = ".parquet"
TRIES = 10  # to open a copy before another process removes it


class Archives:
    """Shards as local archives. The last `at_once` of them are kept open.

    `column` is the one of images in tables.
    """

    def __init__(self, store: Store, at_once: int, column: str | None = None) -> None:
        self.store = store
        self.at_once = at_once
        self.column = column
        self._opened = lru_cache(maxsize=at_once)(self._open)

    def __reduce__(self) -> "tuple[type[Archives], tuple[Store, int, str | None]]":
        """Copy to another process, where no archive is open."""
        return Archives, (self.store, self.at_once, self.column)

    def at(self, url: str) -> "Archive":
        """Return the open archive at `url`, which is fetched or made if it is not there.

        Raises InputError where it cannot be read.
        """
        archive = self._opened(url)
        self.store.touch(archive.path)
        return archive

    def _open(self, url: str) -> "Archive":
        """Open a local archive. Another process may remove it meanwhile; then it is made again."""
        for _ in range(TRIES):
            try:
                return Archive(self._local(url), url)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise InputError(f"{url}: cannot be read ({error.strerror or error}); restore it") from error

        raise InputError(f"{url}: removed while it was read; restore it, or raise data.cache_gigabytes")

    def _local(self, url: str) -> Path:
        """Return the path of a local archive, made of the table if `url` is one."""
        if not is_table(url):
            return self.store.local(url)
        return self.store.local(url, partial(table_to_tar, column=self.column), f"tar of {self.column}")


def is_table(url: str) -> bool:
    """Say whether `url` is a Parquet table and not an archive."""
    return base_name(url).endswith(TABLE)


class Archive:
    """One archive. It stays open, so that it can be read even when it has been removed."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY)
        self.members = scan(path, url)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def length(self, index: int) -> int:
        """Return the length of a member in bytes."""
        return int(self.members.lengths[index])

    def read(self, index: int) -> bytes:
        """Read the bytes of a member."""
        return os.pread(self.number, self.length(index), int(self.members.offsets[index]))


INDEX = "index.json"  # beside shards that `vae prepare` made: how many images each holds
DROPPED = "dropped.jsonl"  # and which images were dropped
OPEN_FILES = 16  # archives
READERS = 8  # threads that count images


class Counted(NamedTuple):
    """A shard with the number of its images.

    `url` is where it is, `title` what it is called. `mark` changes when the images do.
    """

    url: str
    title: str
    images: int
    mark: str


class Shards(Source):
    """The shards `found`: archives (.tar) and tables (.parquet). Empty ones are skipped."""

    def __init__(self, found: Sequence[Counted], archives: Archives) -> None:
        self.found = [shard for shard in found if shard.images]
        self.urls, self.counts = [shard.url for shard in self.found], [shard.images for shard in self.found]
        self.shards = self.counts
        self.archives = archives
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self.names = Computed(sum(self.counts), self.name)

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of an image's shard, and its number within the shard."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def read(self, index: int) -> Encoded:
        """Read the bytes of an image. Raise ImageError where they are too many."""
        shard, within = self.place(index)
        archive = self._archive(shard)
        check_length(archive.length(within), self.label(index))
        return archive.read(within)

    def label(self, index: int) -> str:
        """Return what an error calls the image: its shard and its name there."""
        shard, within = self.place(index)
        return f"{self.urls[shard]}: {self._archive(shard).members.names[within]}"

    def name(self, index: int) -> str:
        """Return the name of an image: "shard/member"."""
        shard, within = self.place(index)
        return f"{self.found[shard].title}/{self._archive(shard).members.names[within]}"

    def fingerprint(self) -> str:
        """Hash the shards' names and what each holds, wherever they lie."""
        listed = json.dumps([[shard.title, shard.images, shard.mark] for shard in self.found])
        return xxhash.xxh3_128(listed.encode()).hexdigest()

    def part(self, chosen: Sequence[int]) -> "Shards":
        """Return a source of these shards only."""
        return Shards([self.found[shard] for shard in chosen], self.archives)

    @property
    def is_local(self) -> bool:
        """Whether every shard is an archive on this machine."""
        return not any(SCHEME in url or is_table(url) for url in self.urls)

    def _archive(self, shard: int) -> Archive:
        """Return an open shard. Raise InputError where it no longer has the images that were counted."""
        archive = self.archives.at(self.urls[shard])
        expected = self.counts[shard]
        found = len(archive.members.names)
        if found != expected:
            wrong = f"{self.urls[shard]}: {found} images, expected {expected}"
            raise InputError(f"{wrong}; the shard is damaged or was changed: restore it, or make its index anew")
        return archive


def open_shards(
    urls: Sequence[str], store: Store, note: Callable[[str], None], column: str | None = None, at_once: int = OPEN_FILES
) -> Shards:
    """Open the images of the shards at `urls`.

    They are counted by the index beside them, or else one by one, and `note` is called with what is damaged. `column`
    is the one of images in tables. The `at_once` shards used last are kept open. Raises InputError where there is no
    image.
    """
    archives = Archives(store, at_once, column)
    counts = _indexed(urls) or _counted(urls, archives, note)
    if not any(images for images, _ in counts):
        raise InputError(f"{urls[0]}: no image in it or in any other of {len(urls)} shards; name others")

    found = [Counted(url, title, *count) for url, title, count in zip(urls, _titles(urls), counts, strict=True)]
    return Shards(found, archives)


def _titles(urls: Sequence[str]) -> list[str]:
    """Return the shards' file names or, where two are the same, their paths below what all have in common."""
    names = list(map(base_name, urls))
    if len(set(names)) == len(names):
        return names
    common = os.path.commonprefix(list(urls)).rpartition("/")[0]  # noqa: RUF071  (of URLs too)
    return [url.removeprefix(f"{common}/") for url in urls]


def _counted(urls: Sequence[str], archives: Archives, note: Callable[[str], None]) -> list[tuple[int, str]]:
    """Count the images of each shard.

    Several shards are counted at a time, since most of it is waiting where they are far.
    """
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
    """Return the number of a shard's images, a mark of them, and its problems."""
    if is_table(url):
        return *rows_in(url), []
    members = archives.at(url).members
    mark = xxhash.xxh3_64_hexdigest(members.names.fingerprint().encode() + members.lengths.tobytes())
    return len(members.names), mark, members.problems


def _indexed(urls: Sequence[str]) -> list[tuple[int, str]] | None:
    """Return what the index beside the shards says, or None where there is none or it does not know them all."""
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
