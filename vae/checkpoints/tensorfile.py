"""One safetensors file: an index of tensors, read one at a time, written as a stream.

The library judges the index (overlaps, holes, sizes, types). Reading and writing are by position, so that memory stays
near one tensor, and a file that shrinks under our hands is an error and not a crash.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae.checkpoints.safe import State, WeightsError, check_space, replacing

MAX_HEADER = 8_000_000  # bytes; a full SDXL checkpoint has 0.4 million
MAX_TENSORS = 10_000  # a full SDXL checkpoint has 2,515
CHUNK = 8 * 1024 * 1024
ALIGNMENT = 8
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        if entry.dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name} is stored as {entry.dtype}, expected one of {list(DTYPES)}")
        if not entry.size:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = bytearray(entry.size)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            self._check_whole(name, file.readinto(data), entry.size)
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

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


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its header, and where its bytes come from once it is its turn."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> "Piece":
        """`tensor` cast to `dtype`; the copy is made when it is written."""
        dtype = dtype or tensor.dtype

        def chunks() -> list[memoryview]:
            data = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
            return [data.numpy().data]

        return cls(NAMES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize, chunks)

    @classmethod
    def copied(cls, index: Index, name: str) -> "Piece":
        """The bytes of another file as they are."""
        entry = index.entries[name]
        return cls(entry.dtype, entry.shape, entry.size, lambda: index.chunks(name))


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
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, described in header.items():
        start, stop = described["data_offsets"]
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


def write_safetensors(
    path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str], advance: Callable[[int], object] = int
) -> None:
    """One whole file, or the old one and an error that says why. `advance(bytes)` is told of everything written."""
    with replacing(path) as partial:
        write_pieces(partial, pieces, metadata, path, advance)


def write_pieces(
    partial: Path,
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str],
    path: Path,
    advance: Callable[[int], object] = int,
) -> None:
    """`partial` is to become `path`, which errors name. Larger types come first, so that each is aligned."""
    ordered = dict(sorted(pieces.items(), key=lambda item: -item[1].size // max(1, torch.Size(item[1].shape).numel())))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, piece in ordered.items():
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end + piece.size]}
        end += piece.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % ALIGNMENT)
    check_space(path.parent, end + len(head), path)
    try:
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for piece in ordered.values():
                for chunk in piece.chunks():
                    advance(file.write(chunk))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error}); what was there before is as it was") from error


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """(the index as JSON, where the data begins); its size and count are judged before it costs anything."""
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise WeightsError(f"{path}: damaged or not safetensors (an index of {size:,} bytes); fetch or export it again")
    header = json.loads(file.read(size), object_pairs_hook=_without_repetition)
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
