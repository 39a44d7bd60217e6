"""What a pickle says about tensors, learned without running anything in it.

Every global that is not needed to describe a tensor becomes an inert stand-in, so that checkpoints with Lightning
callbacks, OmegaConf objects or numpy scalars beside their weights load too.
"""

import pickle
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import torch

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


@dataclass(frozen=True)
class Storage:
    """Where a tensor's bytes lie: filled in for legacy files only once the pickle has been read."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class View:
    storage: Storage
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
        self.storages: dict[str, Storage] = {}

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
        return self.storages.setdefault(str(key), Storage(dtype, str(key), elements))


def _rebuild_tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    return View(storage, offset, tuple(size), tuple(stride)) if isinstance(storage, Storage) else _Inert()


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def unpickle(file: IO[bytes], size: int) -> tuple[object, dict[str, Storage]]:
    """(the object, the storages it speaks of) of the pickle that `file`, of `size` bytes, stands at.

    Read through once before: the C unpickler makes room for whatever memo slot a pickle names.
    """
    start = file.tell()
    for operation, argument, _ in pickletools.genops(file):
        if "PUT" in operation.name and isinstance(argument, int) and argument > size:
            raise pickle.UnpicklingError(f"memo slot {argument} in a pickle of at most {size} bytes")
    file.seek(start)
    reader = _TensorsOnly(file)
    return reader.load(), reader.storages
