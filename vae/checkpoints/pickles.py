"""Tensors out of PyTorch's pickles (.ckpt, .pt, .pth, .bin) without running anything in them.

Every global that is not needed to describe a tensor becomes an inert stand-in, so that checkpoints with Lightning
callbacks, OmegaConf objects or numpy scalars beside their weights load too. Tensors are views of the file, checked
against its size before they exist.
"""

import mmap
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vae.checkpoints.safe import WeightsError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch wrote before 1.6
LOCAL_HEADER = 30  # bytes of a zip member's header before its name


@dataclass(frozen=True)
class _Storage:
    """Where a tensor's bytes lie: filled in for legacy files only once the pickle has been read."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands in for any class or function of a pickle: takes everything, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "_Inert":
        return _Inert()

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...


class _TensorsOnly(pickle.Unpickler):
    """`storages` collects every storage that was spoken of, by its key."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name == "torch._utils" and global_name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module_name == "torch._utils" and global_name == "_rebuild_parameter":
            return _rebuild_parameter
        if module_name in ("torch", "torch.storage") and global_name in STORAGES:
            return STORAGES[global_name]
        return _Inert

    def persistent_load(self, pid: Any) -> object:
        kind, dtype, key, _, elements, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(elements, int):
            return _Inert()
        return self.storages.setdefault(str(key), _Storage(dtype, str(key), elements))


def _rebuild_tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    return _View(storage, offset, tuple(size), tuple(stride)) if isinstance(storage, _Storage) else _Inert()


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of a PyTorch file by name, out of nested `state_dict`s; other contents are passed over."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            is_zip = mapped[: len(ZIP_MAGIC)] == ZIP_MAGIC
            tree, storages = _read_zip(path, mapped) if is_zip else _read_legacy(path, file, mapped)
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; none of them has run anything
        raise WeightsError(f"{path}: not a readable PyTorch file ({type(error).__name__}: {error})") from error
    views = _tensors(tree)
    if not views:
        raise WeightsError(f"{path}: a PyTorch file without tensors by name; expected a model's state_dict")
    return {name: _materialise(path, name, view, storages) for name, view in views.items()}


Bytes = dict[str, memoryview]  # a storage's key -> its bytes


def _read_zip(path: Path, mapped: mmap.mmap) -> tuple[object, Bytes]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(mapped):
                raise WeightsError(f"{path}: {member.filename} is compressed, which torch never writes; refused")
        (description,) = (member for member in members if member.filename.endswith("/data.pkl"))
        root = description.filename.removesuffix("data.pkl")
        storages: Bytes = {}
        for member in members:
            if member.filename.startswith(f"{root}data/"):
                start = member.header_offset + LOCAL_HEADER
                name, extra = (int.from_bytes(mapped[start - 4 + i : start - 2 + i], "little") for i in (0, 2))
                start += name + extra
                key = member.filename.removeprefix(f"{root}data/")
                storages[key] = memoryview(mapped)[start : start + member.file_size]
        with archive.open(description) as stream:
            return _TensorsOnly(stream).load(), storages


def _read_legacy(path: Path, file: IO[bytes], mapped: mmap.mmap) -> tuple[object, Bytes]:
    if _TensorsOnly(file).load() != LEGACY_MAGIC:
        raise WeightsError(f"{path}: neither safetensors nor a file of torch.save; fetch it again or convert it")
    for _ in range(2):  # protocol, system
        _TensorsOnly(file).load()
    reader = _TensorsOnly(file)
    tree = reader.load()
    keys = _TensorsOnly(file).load()
    storages: Bytes = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(mapped[position : position + 8], "little")
        position += 8
        size = count * reader.storages[key].dtype.itemsize
        storages[key] = memoryview(mapped)[position : position + size]
        position += size
    return tree, storages


def _tensors(tree: object, depth: int = 4) -> dict[str, _View]:
    """The tensors of the dictionary that has most of them, at most `depth` levels down."""
    if not isinstance(tree, dict) or not depth:
        return {}
    here = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, _View)}
    below = [_tensors(value, depth - 1) for value in tree.values() if isinstance(value, dict)]
    return max([here, *below], key=len)


def _materialise(path: Path, name: str, view: _View, storages: Bytes) -> Tensor:
    data, dtype = storages.get(view.storage.key), view.storage.dtype
    sizes = (view.offset, *view.size, *view.stride)
    if data is None or not all(isinstance(n, int) and n >= 0 for n in sizes) or len(view.size) != len(view.stride):
        raise WeightsError(f"{path}: {name} has no data of its own; the file is damaged")
    available = len(data) // dtype.itemsize
    elements = torch.Size(view.size).numel()
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if elements > available or (elements and last >= available):
        raise WeightsError(f"{path}: {name} claims {elements} values where the file has {available}; it is damaged")
    if not elements:
        return torch.empty(view.size, dtype=dtype)
    whole = torch.frombuffer(data, dtype=dtype, count=available)
    return whole.as_strided(view.size, view.stride, view.offset)
