"""Read and write safetensors files one tensor at a time.

Reading: the safetensors library checks the index (overlaps, holes, sizes, types). Tensors are then read by position, so
that memory stays near the size of one tensor, and a file that is cut off while it is read is an error and not a crash.

Writing: a file is a stream of pieces. A tensor is cast, or copied from another file, when it is its turn.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae.files import State, WeightsError, check_space, replacing

MAX_HEADER = 8_000_000  # bytes; a full SDXL checkpoint has 0.4 million
MAX_TENSORS = 10_000  # a full SDXL checkpoint has 2,515
MAX_OBJECTS = 500_000  # JSON lists and objects in an index, with JSON that somebody put into the metadata
MAX_ELEMENTS = 2**40  # of a tensor, with empty sides counted as 1
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
    """Where a tensor lies in its file. `dtype` is safetensors' name of the type."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


@dataclass(frozen=True)
class Index:
    """The index of a safetensors file, without the data. Tensors are read from the file when they are asked for."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        """Read one tensor on the CPU, in its stored type. Raises WeightsError where type or data cannot be used."""
        entry = self.entries[name]
        return self._values(name, entry.start, entry.size, entry.shape)

    def row(self, name: str, number: int) -> Tensor:
        """Read one slice along the first axis of a tensor of shape (rows, ...): the result has shape (...)."""
        entry = self.entries[name]
        size = entry.size // entry.shape[0]
        return self._values(name, entry.start + number * size, size, entry.shape[1:])

    def _values(self, name: str, start: int, size: int, shape: tuple[int, ...]) -> Tensor:
        """Read `size` bytes from position `start` as a tensor of this shape."""
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
        """Yield the bytes of a tensor, at most `CHUNK` at a time."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            for left in range(entry.size, 0, -CHUNK):
                chunk = file.read(min(CHUNK, left))
                self._check_whole(name, len(chunk), min(CHUNK, left))
                yield chunk

    def _check_whole(self, name: str, got: int, wanted: int) -> None:
        """Raise WeightsError where fewer bytes were read than the index states."""
        if got < wanted:
            raise WeightsError(f"{self.path}: it ends within {name}; it was cut off while being read")


def read_index(path: Path) -> Index:
    """Read the index of a safetensors file.

    Raises WeightsError, naming the file, for anything but a whole, well-formed safetensors file of sensible size.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")

    # Our own limits come first, so that a hostile index is refused before it costs anything.
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
    """Read a file: (tensors on the CPU, metadata).

    `wanted` chooses the names to read out of all names. The other tensors stay on "meta", unread.
    """
    index = read_index(path)
    chosen = wanted(index.entries)
    state = {
        name: index.read(name) if name in chosen else torch.empty(entry.shape, device="meta")
        for name, entry in index.entries.items()
    }
    return state, index.metadata


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Read the header: (the index as JSON, position at which the data begins).

    Size and number of objects are checked before the index is parsed, so that a hostile file costs nothing.
    """
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
    """Make a dictionary of JSON pairs. Raises ValueError where a name occurs twice."""
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a name stands twice in its index")
    return read


ALIGNMENT = 8
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_ZERO = 1e-2  # share of all weights; biases that have just begun to learn are so small too, and are fewer


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its header, and a function that gives its bytes when it is its turn."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> "Piece":
        """Make a piece of `tensor`, cast to `dtype`. The copy is made only when it is written."""
        dtype = dtype or tensor.dtype

        def chunks() -> list[memoryview]:
            data = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
            return [data.numpy().data]

        return cls(NAMES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize, chunks)

    @classmethod
    def copied(cls, index: Index, name: str) -> "Piece":
        """Make a piece of a tensor in another file, whose bytes are copied as they are."""
        entry = index.entries[name]
        return cls(entry.dtype, entry.shape, entry.size, lambda: index.chunks(name))


class Narrowed(NamedTuple):
    """How many weights are too small for a cast to `dtype`, out of `total`."""

    dtype: torch.dtype
    total: int
    zero: int  # become zero and were not
    fewer: int  # stay other than zero, with fewer digits than the type has

    @property
    def words(self) -> str | None:
        """A sentence about the loss, or None where nothing is lost but the rounding that every weight has."""
        if not self.zero and not self.fewer:
            return None
        limit = torch.finfo(self.dtype).tiny
        lost = f"{self.zero:,} became zero and {self.fewer:,} keep fewer digits, being below {limit:.2g}"
        return f"{_named(self.dtype)}: of {self.total:,} weights {lost}"


def narrowed(state: State, dtype: torch.dtype) -> Narrowed:
    """Count the weights in `state` that a cast to `dtype` makes zero or leaves with fewer digits.

    Small weights that `dtype` holds exactly are not counted.
    """
    total = zero = fewer = 0
    for tensor in state.values():
        total += tensor.numel()
        if _holds(dtype, tensor.dtype):
            continue

        # Few are so small: only they are cast and compared.
        values = _wide(tensor).flatten()
        small = values[(values.abs() < torch.finfo(dtype).tiny).nonzero().flatten()]
        cast = small.to(dtype)
        zero += int(((cast == 0) & (small != 0)).sum())
        fewer += int(((cast != 0) & (cast.to(small.dtype) != small)).sum())
    return Narrowed(dtype, total, zero, fewer)


def beyond(state: State, dtype: torch.dtype) -> str | None:
    """Return the name of the first tensor in `state` with a value too large for `dtype`, or None."""
    most = torch.finfo(dtype).max
    narrower = {name: tensor for name, tensor in state.items() if tensor.numel() and not _holds(dtype, tensor.dtype)}
    return next((name for name, tensor in narrower.items() if _wide(tensor).abs().max() > most), None)


def check_range(path: Path, state: State, dtype: torch.dtype | None) -> None:
    """Raise WeightsError where `dtype` cannot hold `state`. The error names `path`, the file to be written."""
    name = None if dtype is None else beyond(state, dtype)
    if dtype is not None and name is not None:
        remedy = "write bfloat16 or float32, or use --fp16-safe" if dtype is torch.float16 else "its training diverged"
        raise WeightsError(f"{path}: {name} exceeds {_named(dtype)}; {remedy}")


def pieces_of(path: Path, state: State, dtype: torch.dtype | None) -> dict[str, Piece]:
    """Make pieces of `state`, cast to `dtype` or, where it is None, as it is.

    Warns where more weights become zero than in a sound network. Raises WeightsError where `dtype` cannot hold them.
    Both name `path`, the file to be written.
    """
    check_range(path, state, dtype)
    lost = None if dtype is None else narrowed(state, dtype)
    if lost is not None and lost.zero > MOST_ZERO * lost.total:
        warnings.warn(f"{path}: {lost.words}; keep it in float32", stacklevel=4)
    return {name: Piece.of(tensor, dtype) for name, tensor in state.items()}


def write_safetensors(
    path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str], advance: Callable[[int], object] = int
) -> None:
    """Write a file, whole or not at all: where it fails the old file stays and WeightsError says why.

    `advance` is called with the number of bytes of each write.
    """
    with replacing(path) as partial:
        write_pieces(partial, pieces, metadata, path, advance)


def write_pieces(
    partial: Path,
    pieces: Mapping[str, Piece],
    metadata: Mapping[str, str],
    path: Path,
    advance: Callable[[int], object] = int,
) -> None:
    """Write pieces to `partial`, the temporary file that will become `path`; errors name `path`.

    Larger types come first, so that every tensor is aligned. Raises WeightsError where the disk has too little space.
    """
    ordered = dict(sorted(pieces.items(), key=lambda item: -item[1].size // max(1, torch.Size(item[1].shape).numel())))

    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, piece in ordered.items():
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end + piece.size]}
        end += piece.size

    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % ALIGNMENT)
    check_space(path.parent, end + len(head), path)

    with partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for piece in ordered.values():
            for chunk in piece.chunks():
                advance(file.write(chunk))


def _named(dtype: torch.dtype) -> str:
    """Return the name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether `dtype` has the range of `other` and holds all of its small values."""
    wide, narrow = torch.finfo(dtype), torch.finfo(other)
    return dtype is other or (wide.max >= narrow.max and wide.tiny <= narrow.tiny * narrow.eps)


def _wide(tensor: Tensor) -> Tensor:
    """Convert to float32 or keep float64: types of 8 bits do not compute."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
