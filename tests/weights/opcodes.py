"""Pieces of hostile pickles, operation by operation, and the containers that torch would have put them in."""

import io
import pickle
import pickletools
import zipfile
from typing import Any

import torch

State = dict[str, torch.Tensor]

PROTOCOL_4 = b"\x80\x04"
STORAGE = 64  # bytes of the one storage in `small_zip`


def value(plain: object) -> bytes:
    return pickle.dumps(plain, 2)[2:-1]


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: object) -> bytes:
    return function + value(arguments) + b"R"


def storage(key: bytes = value("0")) -> bytes:
    return b"(" + value("storage") + name_of("torch", "FloatStorage") + key + value("cpu") + value(STORAGE // 4) + b"tQ"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], data: bytes | None = None) -> bytes:
    arguments = (storage() if data is None else data) + value(0) + value(size) + value(stride) + value(False) + b"}"
    return name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def named(content: bytes, name: bytes = value("decoder.conv_in.weight")) -> bytes:
    """A pickle of one dictionary with one item."""
    return PROTOCOL_4 + b"}" + name + content + b"s."


def small_zip(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip of this pickle and one storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(STORAGE))
    return file.getvalue()


def saved(content: Any, *, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def torch_zip(state: State, payload: bytes) -> bytes:
    """What torch.save writes, whose pickle runs the payload as well once the weights are on its stack."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"state_dict": state}, zipped=True))) as old,
        zipfile.ZipFile(file, "w") as new,
    ):
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, content[:-1] + payload + b"0." if member.endswith("/data.pkl") else content)
    return file.getvalue()


def torch_legacy(state: State, payload: bytes) -> bytes:
    """The same in the form that torch wrote before 1.6."""
    whole = saved({"state_dict": state}, zipped=False)
    reader = io.BytesIO(whole)
    for _ in ("magic", "protocol", "system", "weights"):
        for _ in pickletools.genops(reader):
            pass
    end = reader.tell() - 1
    return whole[:end] + payload + b"0" + whole[end:]
