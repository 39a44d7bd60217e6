"""A safetensors file written as a stream, its tensors cast or copied when it is their turn."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae.checkpoints.safe import State, WeightsError, check_space, replacing
from vae.checkpoints.tensorfile import DTYPES, Index

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
