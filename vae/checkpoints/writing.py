"""A safetensors file written as a stream, its tensors cast or copied when it is their turn."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae.checkpoints.safe import State, WeightsError, check_space, replacing
from vae.checkpoints.tensorfile import DTYPES, Index

ALIGNMENT = 8
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT16_MAX = torch.finfo(torch.float16).max


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


def pieces_of(path: Path, state: State, dtype: torch.dtype | None) -> dict[str, Piece]:
    """`state` cast to `dtype`, or as it is; refused where float16 cannot hold it. Errors name `path`, the target."""
    if dtype is torch.float16:
        for name, tensor in state.items():
            if tensor.numel() and tensor.float().abs().max() > FLOAT16_MAX:
                raise WeightsError(f"{path}: {name} exceeds float16; write bfloat16 or float32, or use --fp16-safe")
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
