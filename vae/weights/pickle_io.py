"""Read tensors from PyTorch's files (.ckpt, .pt, .pth, .bin) without running anything in them.

A file is a zip archive or, in the older form, a series of pickles. Every global that is not needed to describe a tensor
becomes an inert stand-in. So checkpoints with Lightning callbacks, OmegaConf objects or numpy scalars beside their
weights load too. Tensors are checked against the size of the file before they exist.
"""

import math
import mmap
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vae.files import State, WeightsError

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
LARGEST_TUPLE = 1000  # items; those of a nested tuple count each time the tuple occurs


@dataclass(frozen=True)
class Storage:
    """The storage of a tensor in a file. Its data are found only after the pickle has been read."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class View:
    """A tensor as a view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Pickle:
    """The object in a pickle, the storages that it mentions, and the kinds of tensors that could not be read."""

    tree: object
    storages: dict[str, Storage]
    unread: set[str]


def unpickle(file: IO[bytes]) -> Pickle:
    """Read one pickle from the position of `file`."""
    reader = _TensorsOnly(file)
    return Pickle(reader.load(), reader.storages, reader.unread)


class _Inert:
    """A stand-in for any class or function in a pickle: it accepts everything and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "_Inert":
        return _Inert()

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...


class _Tuple(tuple[object, ...]):
    """A tuple that knows its size with everything nested in it.

    Tuples nest by reference, so a few bytes of pickle can make one whose hash takes for ever.
    """

    size: int


_Unpickler: Any = pickle._Unpickler  # a private class without types


class _TensorsOnly(_Unpickler):
    """An unpickler that makes only tensors and plain containers.

    It is based on the unpickler written in Python, whose memo is a dictionary; the one in C reserves memory up to any
    memo slot that a file names. `storages` collects every storage that is mentioned, by its key. `unread` collects the
    names of the functions that make other kinds of tensors.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}
        self.unread: set[str] = set()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the safe function for a global that describes tensors, and the inert stand-in for any other."""
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
        """Return the storage that a persistent id describes, or the stand-in where it is not one."""
        kind, dtype, key, _, elements, *_ = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype)
        if not known or not isinstance(key, str | int) or not isinstance(elements, int):
            return _Inert()
        return self.storages.setdefault(str(key), Storage(dtype, str(key), elements))

    def _forget_state(self) -> None:
        """Ignore BUILD, which would set attributes of any object, ours included."""
        self.stack.pop()

    def _forget_items(self) -> None:
        """Ignore FROZENSET, which would hash its items."""
        self.pop_mark()
        self.append(_Inert())

    def _read_bytearray(self) -> None:
        """Read BYTEARRAY8 without reserving memory first.

        The original reserves any length that is stated, before it is known whether the file has so many bytes.
        """
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _measure_tuple(self) -> None:
        """Replace a new tuple on the stack by one that knows its size, or by the stand-in where it is too large."""
        made = _Tuple(self.stack[-1])
        made.size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in made)
        self.stack[-1] = made if made.size <= LARGEST_TUPLE else _Inert()


Operation = Callable[[Any], None]


def _measured(load: Operation) -> Operation:
    """Wrap an operation that makes a tuple, so that the tuple is measured at once."""

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
    """Return the view that `torch._utils._rebuild_tensor_v2` would make a tensor of."""
    return View(storage, offset, tuple(size), tuple(stride)) if isinstance(storage, Storage) else _Inert()


def _rebuild_parameter(data: object, *_: object) -> object:
    """Return the tensor of a parameter, as `torch._utils._rebuild_parameter` would."""
    return data


ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch before 1.6 wrote
LOCAL_HEADER = 30  # bytes of a zip member's header that precede its name
MAX_ELEMENTS = 2**40  # of a tensor, with empty sides counted as 1
MOST_SHARED = 16  # times the file's size: the most that all tensors may take once tied ones are apart
DEPTH = 4  # levels of nested dictionaries that are searched for the weights


@dataclass
class Data:
    """The bytes of a storage, and the checksum that the archive states until it has been compared."""

    content: memoryview
    crc: int | None = None


def read_pickle(path: Path, wanted: Callable[[Iterable[str]], set[str]] = set, *, whole: bool = False) -> State:
    """Read the tensors of a PyTorch file by name, out of nested `state_dict`s; other contents are ignored.

    `wanted` chooses the names to read out of all names. The other tensors stay on "meta". `whole` is for callers that
    go through all of a large file. Its tensors are then views of the file, which must not change meanwhile, and a file
    with tensors of an unreadable kind is refused instead of read in part. Raises WeightsError where the file cannot be
    used.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            is_zip = mapped[: len(ZIP_MAGIC)] == ZIP_MAGIC
            pickled, storages = _read_zip(path, mapped) if is_zip else _read_legacy(path, file, mapped)
        if whole and pickled.unread:
            raise WeightsError(f"{path}: tensors of a kind that is not read from pickles; save it as safetensors first")
        views = _tensors(path, pickled.tree)
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; none of them has run anything
        raise WeightsError(f"{path}: not a readable PyTorch file ({type(error).__name__}: {error})") from error

    if not views:
        raise WeightsError(f"{path}: a PyTorch file without tensors by name; expected a model's state_dict")

    chosen = wanted(views)
    for name, view in views.items():
        _check_view(path, name, view, storages)

    # Tensors may share their data: without a limit a small file could ask for any amount of memory.
    needed = sum(views[name].storage.dtype.itemsize * math.prod(views[name].size) for name in chosen)
    if needed > MOST_SHARED * len(mapped):
        times = f"{needed / len(mapped):,.0f} times as large as the file, and at most {MOST_SHARED} are read"
        raise WeightsError(f"{path}: its tensors share their data and are {times}; save it with data for each")

    return {
        name: _read(path, name, view, storages[view.storage.key], copy=not whole)
        if name in chosen
        else torch.empty(view.size, dtype=view.storage.dtype, device="meta")
        for name, view in views.items()
    }


def _read_zip(path: Path, mapped: mmap.mmap) -> tuple[Pickle, dict[str, Data]]:
    """Read the pickle in a zip archive: (pickle, storages by key).

    Raises WeightsError where a member is compressed or claims more bytes than the file has, as a zip bomb does.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(mapped):
            raise WeightsError(f"{path}: its members claim more bytes than it has; it is damaged")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(mapped):
                raise WeightsError(f"{path}: {member.filename!r} is not stored whole, as torch does it; refused")

        (description,) = (member for member in members if member.filename.endswith("/data.pkl"))
        folder = description.filename.removesuffix("data.pkl") + "data/"
        storages = {
            member.filename.removeprefix(folder): Data(_bytes_of(member, mapped), member.CRC)
            for member in members
            if member.filename.startswith(folder)
        }

        with archive.open(description) as stream:
            return unpickle(stream), storages


def _bytes_of(member: zipfile.ZipInfo, mapped: mmap.mmap) -> memoryview:
    """Return a view of a member's bytes.

    Stored members lie in the archive uncompressed, behind a header whose last fields are the lengths of the name and of
    the extra field.
    """
    start = member.header_offset + LOCAL_HEADER
    name, extra = (int.from_bytes(mapped[start - 4 + i : start - 2 + i], "little") for i in (0, 2))
    start += name + extra
    return memoryview(mapped)[start : start + member.file_size]


def _read_legacy(path: Path, file: IO[bytes], mapped: mmap.mmap) -> tuple[Pickle, dict[str, Data]]:
    """Read a file that torch before 1.6 wrote: (pickle, storages by key).

    Such a file is five pickles (magic number, protocol, system, objects, keys of the storages), and then the data of
    each storage behind its number of elements.
    """
    if unpickle(file).tree != LEGACY_MAGIC:
        raise WeightsError(f"{path}: neither safetensors nor a file of torch.save; fetch it again or convert it")

    for _ in range(2):  # protocol, system
        unpickle(file)
    pickled = unpickle(file)
    spoken_of = pickled.storages
    keys = unpickle(file).tree

    storages: dict[str, Data] = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in spoken_of:
            raise WeightsError(f"{path}: it lists a storage that no tensor speaks of; it is damaged")
        count = int.from_bytes(mapped[position : position + 8], "little")
        position += 8
        length = count * spoken_of[key].dtype.itemsize
        storages[key] = Data(memoryview(mapped)[position : position + length])
        position += length
    return pickled, storages


def _tensors(path: Path, tree: object) -> dict[str, View]:
    """Return the tensors of the dictionary that has most of them, at most `DEPTH` levels down.

    Every dictionary is looked at once. Raises WeightsError where several have the most.
    """
    level: list[tuple[str, object]] = [("", tree)]
    seen: set[int] = set()
    sets: list[tuple[str, dict[str, View]]] = []

    for _ in range(DEPTH):
        dictionaries = {id(item): (key, item) for key, item in level if isinstance(item, dict) and id(item) not in seen}
        seen |= dictionaries.keys()
        for key, item in dictionaries.values():
            sets.append((key, {n: v for n, v in item.items() if isinstance(n, str) and isinstance(v, View)}))

        level = [
            (str(key)[:40], value)
            for _, item in dictionaries.values()
            for key, value in item.items()
            if isinstance(key, str)
        ]

    most = max((len(views) for _, views in sets), default=0)
    largest = [(key, views) for key, views in sets if len(views) == most]
    if most and len(largest) > 1:
        keys = [key for key, _ in largest][:3]
        raise WeightsError(f"{path}: {len(largest)} sets of weights of one size ({keys}); save the one you want alone")
    return largest[0][1] if largest else {}


def _check_view(path: Path, name: str, view: View, storages: dict[str, Data]) -> None:
    """Raise WeightsError where the file does not hold a tensor, before the tensor exists."""
    data = storages.get(view.storage.key)
    sizes = (view.offset, *view.size, *view.stride)
    if data is None or not all(isinstance(n, int) and n >= 0 for n in sizes) or len(view.size) != len(view.stride):
        raise WeightsError(f"{path}: {name} has no data of its own; the file is damaged")

    if math.prod(max(1, n) for n in view.size) > MAX_ELEMENTS or max(sizes) > MAX_ELEMENTS:
        raise WeightsError(f"{path}: {name} has sides of {view.size}; it is damaged")

    available = len(data.content) // view.storage.dtype.itemsize
    elements = math.prod(view.size)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if elements > available or (elements and last >= available):
        raise WeightsError(f"{path}: {name} claims {elements} values where the file has {available}; it is damaged")


def _read(path: Path, name: str, view: View, data: Data, *, copy: bool) -> Tensor:
    """Return the tensor of a view: a copy, or a view of the file. Raises WeightsError where its checksum differs."""
    dtype = view.storage.dtype
    if not math.prod(view.size):
        return torch.empty(view.size, dtype=dtype)

    _check_sum(path, name, data)
    whole = torch.frombuffer(data.content, dtype=dtype, count=len(data.content) // dtype.itemsize)
    tensor = whole.as_strided(view.size, view.stride, view.offset)
    return tensor.clone() if copy else tensor


def _check_sum(path: Path, name: str, data: Data) -> None:
    """Compare a storage with the checksum that the archive states, the first time it is read."""
    if data.crc is not None and zlib.crc32(data.content) != data.crc:
        raise WeightsError(f"{path}: {name} is not what was written there; the file is damaged, fetch it again")
    data.crc = None
