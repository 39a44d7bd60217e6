"""Reading and writing weight files: nothing is executed, nothing half-written is left behind."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vae.errors import InputError

State = dict[str, Tensor]


class WeightsError(InputError):
    """A weight file cannot be used: names the file, what is wrong and what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Contiguous copies, `format: pt` in the metadata, and a file that others may read (safetensors makes it 0600)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **metadata})
        partial.chmod(0o666 & ~_umask())


def read_safetensors(path: Path, wanted: Callable[[list[str]], str] = lambda _: "") -> tuple[State, dict[str, str]]:
    """(tensors on the CPU, metadata). `wanted(names)` is the prefix of those to read; the others stay on "meta"."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prefix = wanted(names)
            state = {
                name: file.get_tensor(name)
                if name.startswith(prefix)
                else torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in names
            }
            return state, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or not safetensors ({error}); fetch or export it again") from error


def check_keys(path: Path, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise WeightsError(
            f"{path}: {len(missing)} keys missing (first {missing[:3]}) and {len(extra)} unknown (first {extra[:3]}) "
            f"for this architecture; check that the file is a complete KL autoencoder of the stated configuration"
        )


def check_tensors(path: Path, state: State, like: Callable[[str], Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.shape != like(name).shape:
            raise WeightsError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(like(name).shape)}")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: {name} holds NaN or infinite values; the training that wrote it has diverged")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
