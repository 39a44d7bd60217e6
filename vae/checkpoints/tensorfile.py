"""One safetensors file: an index of tensors, read one at a time.

The library judges the index (overlaps, holes, sizes, types). Reading is by position, so that memory stays near one
tensor, and a file that shrinks under our hands is an error and not a crash.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae.checkpoints.safe import State, WeightsError

MAX_HEADER = 8_000_000  # bytes; a full SDXL checkpoint has 0.4 million
MAX_TENSORS = 10_000  # a full SDXL checkpoint has 2,515
MAX_OBJECTS = 500_000  # of JSON in an index, metadata in somebody's own JSON included
MAX_ELEMENTS = 2**40  # of a tensor, were its empty sides 1
CHUNK = 8 * 1024 * 1024
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file. `dtype` is safetensors' word."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


@dataclass(frozen=True)
class Index:
    """A safetensors file without its data."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        return self._values(name, entry.start, entry.size, entry.shape)

    def row(self, name: str, number: int) -> Tensor:
        """One of the tensor's first axis."""
        entry = self.entries[name]
        size = entry.size // entry.shape[0]
        return self._values(name, entry.start + number * size, size, entry.shape[1:])

    def _values(self, name: str, start: int, size: int, shape: tuple[int, ...]) -> Tensor:
        dtype = self.entries[name].dtype
        if dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name} is stored as {dtype}, expected one of {list(DTYPES)}")
        if not size:
            return torch.empty(shape, dtype=DTYPES[dtype])
        data = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(start)
            self._check_whole(name, file.readinto(data), size)
        return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, a piece at a time."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            for left in range(entry.size, 0, -CHUNK):
                chunk = file.read(min(CHUNK, left))
                self._check_whole(name, len(chunk), min(CHUNK, left))
                yield chunk

    def _check_whole(self, name: str, got: int, wanted: int) -> None:
        if got < wanted:
            raise WeightsError(f"{self.path}: it ends within {name}; it was cut off while being read")


def read_index(path: Path) -> Index:
    """Refuses anything that is not a whole, well-formed safetensors file of sensible size, naming it."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            header, data = _read_header(path, file)
        with safe_open(path, framework="pt") as judge:
            judge.keys()
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError, OverflowError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: damaged or not safetensors ({error}); fetch or export it again") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, described in header.items():
        start, stop = described["data_offsets"]
        if math.prod(max(1, side) for side in described["shape"]) > MAX_ELEMENTS:
            raise WeightsError(f"{path}: {name!r} has sides of {described['shape']}; not a model's weights")
        entries[name] = Entry(described["dtype"], tuple(described["shape"]), data + start, stop - start)
    return Index(path, entries, metadata)


def read_safetensors(path: Path, wanted: Callable[[Iterable[str]], set[str]] = set) -> tuple[State, dict[str, str]]:
    """(tensors on the CPU, metadata). Those not among `wanted(names)` stay on "meta", unread."""
    index = read_index(path)
    chosen = wanted(index.entries)
    state = {
        name: index.read(name) if name in chosen else torch.empty(entry.shape, device="meta")
        for name, entry in index.entries.items()
    }
    return state, index.metadata


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """(the index as JSON, where the data begins); its size and count are judged before it costs anything."""
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise WeightsError(f"{path}: damaged or not safetensors (an index of {size:,} bytes); fetch or export it again")
    text = file.read(size)
    if text.count(b"{") + text.count(b"[") > MAX_OBJECTS:
        raise WeightsError(f"{path}: its index has more than {MAX_OBJECTS:,} lists and objects; not a model's weights")
    header = json.loads(text, object_pairs_hook=_without_repetition)
    if not isinstance(header, dict):
        raise ValueError("its index is not a JSON object")
    if len(header) > MAX_TENSORS:
        raise WeightsError(f"{path}: {len(header):,} tensors, expected at most {MAX_TENSORS:,}; not a model's weights")
    return header, 8 + size


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a name stands twice in its index")
    return read
