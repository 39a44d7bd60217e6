"""Tar archives read in place: which images are in one, and where. Nothing is ever extracted."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from vae.data.images import EXTENSIONS
from vae.data.names import Names
from vae.errors import InputError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512


class Members(NamedTuple):
    """The images of one archive: names, where their bytes begin, how many they are; and what is wrong with the rest."""

    names: Names
    offsets: np.ndarray
    lengths: np.ndarray
    problems: list[str]


def scan(path: Path) -> Members:
    """Regular files with an image's extension; links, devices and whatever else is in it are passed over.

    Of two members of one name the first counts. Where the archive ends too early, the images before that are kept.
    """
    size = path.stat().st_size
    _check_plain(path)
    found: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in _forward(archive):
                    end = member.offset_data + member.size
                    if not member.isreg() or not _is_image(member.name):
                        continue
                    if end > size:
                        raise EOFError(f"{member.name} of {member.size} bytes goes on behind the end, {size}")
                    if member.name in found:
                        problems.append(f"{path}: two members are called {member.name}; the first is taken")
                    found.setdefault(member.name, (member.offset_data, member.size))
                if archive.offset > size:
                    raise EOFError(f"the last member goes on behind the end, {size}")
        except Exception as error:  # damaged headers raise nearly anything
            reason = " ".join(str(error).split())[:200]
            problems.append(f"{path}: damaged after {len(found)} images ({reason}); these are used, the rest is lost")
    if not found:
        raise InputError(f"{path}: no image in it{': ' + problems[0] if problems else ''}")
    places = np.array(list(found.values()), dtype=np.int64)
    return Members(Names(found), places[:, 0], places[:, 1], problems)


def _forward(archive: tarfile.TarFile) -> "list[tarfile.TarInfo]":
    """The members, as long as each lies behind the one before: a negative length must not lead in circles."""
    members, behind = [], -1
    while (member := archive.next()) is not None:
        if member.offset <= behind or member.size < 0 or archive.offset <= member.offset:
            raise tarfile.ReadError(f"a member at {member.offset} that leads backwards")
        behind = member.offset
        members.append(member)
    return members


def _check_plain(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(BLOCK)
    for signature, kind in COMPRESSED.items():
        if start.startswith(signature):
            raise InputError(f"{path}: compressed with {kind}, so it cannot be read in place; decompress it once")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
