"""Tar archives read in place: which images are in one, and where. Nothing is ever extracted.

Headers are read here, since made-up ones can keep Python's `tarfile` busy for ever (CVE-2024-6232, CVE-2025-8194).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae.data.images import EXTENSIONS
from vae.data.names import Names
from vae.errors import InputError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes of a member's extended header, which has names too long for a block
PADDING = 1 << 16  # zeros that may follow the last member
REGULAR, WITHOUT_DATA, LONG_NAME, EXTENDED, FOR_LATER = b"\x0007", b"123456", b"L", b"x", b"Kg"  # kinds of members


class Members(NamedTuple):
    """The images of one archive: names, where their bytes begin, how many they are; and what is wrong with the rest."""

    names: Names
    offsets: np.ndarray
    lengths: np.ndarray
    problems: list[str]


class _DamageError(Exception):
    pass


def scan(path: Path, label: str | None = None) -> Members:
    """Regular files with an image's extension; links, devices and whatever else is in it are passed over.

    Of two members of one name the first counts. Where the archive is damaged, the images before that are kept. Errors
    call it `label`.
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
    """(name, where its bytes begin, how many they are) of each regular member."""
    size, at = os.fstat(file).st_size, 0
    known: dict[bytes, bytes] = {}  # what extended headers say of the member that follows them
    while any(header := os.pread(file, BLOCK, at)):
        length = _length(header, known, at)
        kind, start = header[156:157], at + BLOCK
        if start + length > size:
            raise _DamageError(f"the member at {at} goes on behind the end, {size}")
        if kind in LONG_NAME + EXTENDED:
            known |= _extended(file, start, length, kind)
        elif kind not in FOR_LATER:
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
    """Of the member's bytes, once the header is known to be one."""
    try:
        total = _number(header[148:156])
        length = int(known[b"size"]) if b"size" in known else _number(header[124:136])
    except ValueError:
        total = length = -1
    if len(header) < BLOCK or length < 0 or total != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _DamageError(f"no member's header at {at}")
    return 0 if header[156:157] in WITHOUT_DATA else length


def _number(field: bytes) -> int:
    """Octal digits, or a large number in binary."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _own_name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _extended(file: int, start: int, length: int, kind: bytes) -> dict[bytes, bytes]:
    """GNU's long name, or the records "<length of the record> <key>=<value>\\n" of pax."""
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
        records[key], at = value, end
    return records


def _check_plain(start: bytes, label: str) -> None:
    for signature, kind in COMPRESSED.items():
        if start.startswith(signature):
            raise InputError(f"{label}: compressed with {kind}, so it cannot be read in place; decompress it once")


def _is_image(name: bytes) -> bool:
    base = os.fsdecode(name).rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in EXTENSIONS and not base.startswith(".")  # noqa: PTH122  (by millions)
