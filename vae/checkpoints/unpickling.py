"""What a pickle says about tensors, learned without running anything in it.

Every global that is not needed to describe a tensor becomes an inert stand-in, so that checkpoints with Lightning
callbacks, OmegaConf objects or numpy scalars beside their weights load too.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
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
LARGEST_TUPLE = 1000  # items, those of the tuples in it counted each time they stand there


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


@dataclass(frozen=True)
class Pickle:
    """An object, the storages it speaks of, and kinds of tensors in it that could not be read."""

    tree: object
    storages: dict[str, Storage]
    unread: set[str]


def unpickle(file: IO[bytes]) -> Pickle:
    """Of the pickle that `file` stands at."""
    reader = _TensorsOnly(file)
    return Pickle(reader.load(), reader.storages, reader.unread)


class _Inert:
    """Stands in for any class or function of a pickle: takes everything, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "_Inert":
        return _Inert()

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...


class _Tuple(tuple[object, ...]):
    """Knows how much it holds: tuples nest by reference, and a few bytes make one whose hash takes for ever."""

    size: int


_Unpickler: Any = pickle._Unpickler  # whose insides have no types


class _TensorsOnly(_Unpickler):
    """The unpickler written in Python: its memo is a dictionary, where the one in C makes room for any slot named.

    `storages` collects every storage that was spoken of, by its key; `unread` functions that make other tensors.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}
        self.unread: set[str] = set()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name == "torch._utils" and global_name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module_name == "torch._utils" and global_name == "_rebuild_parameter":
            return _rebuild_parameter
        if module_name in ("torch", "torch.storage") and global_name in STORAGES:
            return STORAGES[global_name]
        if module_name == "torch._utils" and global_name.startswith("_rebuild"):
            self.unread.add(global_name)
        return _Inert

    def persistent_load(self, pid: Any) -> object:
        kind, dtype, key, _, elements, *_ = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype)
        if not known or not isinstance(key, str | int) or not isinstance(elements, int):
            return _Inert()
        return self.storages.setdefault(str(key), Storage(dtype, str(key), elements))

    def _forget_state(self) -> None:
        """BUILD: would set attributes of whatever is there, ours included."""
        self.stack.pop()

    def _forget_items(self) -> None:
        """FROZENSET: would hash its items."""
        self.pop_mark()
        self.append(_Inert())

    def _read_bytearray(self) -> None:
        """BYTEARRAY8: would make room for any length named, before it is seen whether so much is there."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _measure_tuple(self) -> None:
        made = _Tuple(self.stack[-1])
        made.size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in made)
        self.stack[-1] = made if made.size <= LARGEST_TUPLE else _Inert()


Operation = Callable[[Any], None]


def _measured(load: Operation) -> Operation:
    def run(reader: _TensorsOnly) -> None:
        load(reader)
        reader._measure_tuple()

    return run


_theirs = _Unpickler.dispatch
_TensorsOnly.dispatch = _theirs | {
    pickle.BUILD[0]: _TensorsOnly._forget_state,
    pickle.FROZENSET[0]: _TensorsOnly._forget_items,
    pickle.BYTEARRAY8[0]: _TensorsOnly._read_bytearray,
    **{op[0]: _measured(_theirs[op[0]]) for op in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)},
}


def _rebuild_tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    return View(storage, offset, tuple(size), tuple(stride)) if isinstance(storage, Storage) else _Inert()


def _rebuild_parameter(data: object, *_: object) -> object:
    return data
