"""One safetensors file: an index of tensors, read one at a time.

The library judges the index (overlaps, holes, sizes, types). Reading is by position, so that memory stays near one
tensor, and a file that shrinks under our hands is an error and not a crash.


A safetensors file written as a stream, its tensors cast or copied when it is their turn."""

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


ALIGNMENT = 8
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_ZERO = 1e-3  # of all weights; in a sound network a few in a million are so small


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


class Narrowed(NamedTuple):
    """What a cast to `dtype` does to weights that are too small for it, of so many in all."""

    dtype: torch.dtype
    total: int
    zero: int  # were not, and are now
    fewer: int  # keep fewer digits than the type has

    @property
    def words(self) -> str | None:
        """None where nothing was lost but the rounding that every weight has."""
        if not self.zero and not self.fewer:
            return None
        limit = torch.finfo(self.dtype).tiny
        lost = f"{self.zero:,} became zero and {self.fewer:,} keep fewer digits, being below {limit:.2g}"
        return f"{_named(self.dtype)}: of {self.total:,} weights {lost}"


def narrowed(state: State, dtype: torch.dtype) -> Narrowed:
    """What a cast to `dtype` does to the weights in `state`; those that it holds exactly are not lost."""
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
    """The first tensor in `state` with a value that is too large for `dtype`; None where there is none."""
    most = torch.finfo(dtype).max
    narrower = {name: tensor for name, tensor in state.items() if tensor.numel() and not _holds(dtype, tensor.dtype)}
    return next((name for name, tensor in narrower.items() if _wide(tensor).abs().max() > most), None)


def check_range(path: Path, state: State, dtype: torch.dtype | None) -> None:
    """Refuse `state` where `dtype` cannot hold it. The error names `path`, the target."""
    name = None if dtype is None else beyond(state, dtype)
    if dtype is not None and name is not None:
        remedy = "write bfloat16 or float32, or use --fp16-safe" if dtype is torch.float16 else "its training diverged"
        raise WeightsError(f"{path}: {name} exceeds {_named(dtype)}; {remedy}")


def pieces_of(path: Path, state: State, dtype: torch.dtype | None) -> dict[str, Piece]:
    """`state` cast to `dtype`, or as it is; refused where that cannot hold it. Errors name `path`, the target.

    Warns where more weights become zero than in a sound network.
    """
    check_range(path, state, dtype)
    lost = None if dtype is None else narrowed(state, dtype)
    if lost is not None and lost.zero > MOST_ZERO * lost.total:
        warnings.warn(f"{path}: {lost.words}; keep it in float32", stacklevel=4)
    return {name: Piece.of(tensor, dtype) for name, tensor in state.items()}


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
    with partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for piece in ordered.values():
            for chunk in piece.chunks():
                advance(file.write(chunk))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` has the range of `other`, and all of its small values."""
    wide, narrow = torch.finfo(dtype), torch.finfo(other)
    return dtype is other or (wide.max >= narrow.max and wide.tiny <= narrow.tiny * narrow.eps)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: types of 8 bits compute nothing."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
