"""Tensors out of PyTorch's files (.ckpt, .pt, .pth, .bin): zip archives, and the older form that is only pickles.

Tensors are checked against the file's size before they exist.
"""

import math
import mmap
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from vae.checkpoints.safe import State, WeightsError
from vae.checkpoints.unpickling import Pickle, View, unpickle

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch wrote before 1.6
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
MAX_ELEMENTS = 2**40  # of a tensor, were its empty sides 1
MOST_SHARED = 16  # times the file that its tensors may be, each with data of its own, where some are tied
DEPTH = 4  # of nested dictionaries that are looked through for the weights


@dataclass
class Data:
    """A storage's bytes, and the checksum that the archive has of them until it has been compared."""

    content: memoryview
    crc: int | None = None


def read_pickle(path: Path, wanted: Callable[[Iterable[str]], set[str]] = set, *, whole: bool = False) -> State:
    """Tensors of a PyTorch file by name, out of nested `state_dict`s; other contents are passed over.

    Those not among `wanted(names)` stay on "meta". `whole` is for those who go through all of a large file: tensors are
    views of it, so it must stay as it is, and kinds that cannot be read are refused and not passed over.
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
    """Stored members lie in the archive as they are, behind a header whose last fields are two lengths."""
    start = member.header_offset + LOCAL_HEADER
    name, extra = (int.from_bytes(mapped[start - 4 + i : start - 2 + i], "little") for i in (0, 2))
    start += name + extra
    return memoryview(mapped)[start : start + member.file_size]


def _read_legacy(path: Path, file: IO[bytes], mapped: mmap.mmap) -> tuple[Pickle, dict[str, Data]]:
    if unpickle(file).tree != LEGACY_MAGIC:
        raise WeightsError(f"{path}: neither safetensors nor a file of torch.save; fetch it again or convert it")
    for _ in range(2):  # protocol, system
        unpickle(file)
    pickled = unpickle(file)
    spoken_of, keys = pickled.storages, unpickle(file).tree
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
    """The tensors of the dictionary that has most of them, at most `DEPTH` levels down; none is looked at twice."""
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
    """Refuse a tensor that the file does not hold, before it exists."""
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
    dtype = view.storage.dtype
    if not math.prod(view.size):
        return torch.empty(view.size, dtype=dtype)
    _check_sum(path, name, data)
    whole = torch.frombuffer(data.content, dtype=dtype, count=len(data.content) // dtype.itemsize)
    tensor = whole.as_strided(view.size, view.stride, view.offset)
    return tensor.clone() if copy else tensor


def _check_sum(path: Path, name: str, data: Data) -> None:
    if data.crc is not None and zlib.crc32(data.content) != data.crc:
        raise WeightsError(f"{path}: {name} is not what was written there; the file is damaged, fetch it again")
    data.crc = None
