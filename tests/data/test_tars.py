"""Row D5 of the table of faults: archives made to harm whoever unpacks them, which is never done here."""

import gzip
import io
import os
import pickle
import random
import re
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vae.data.decode import ImageError
from vae.data.remote import Store
from vae.data.shards import BLOCK, Shards, open_shards, scan
from vae.errors import InputError

END = bytes(2 * BLOCK)


def _png(level: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), level).save(stream, "PNG")
    return stream.getvalue()


def _member(name: str, data: bytes = b"", kind: bytes = b"0", link: str = "", size: int | None = None) -> bytes:
    """Header and data; `size` is a lie about their length."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if size is None else size
    padding = bytes(-len(data) % BLOCK)
    return info.tobuf(tarfile.GNU_FORMAT) + data + padding


def _pax(records: bytes, size: int | None = None) -> bytes:
    return _member("pax", records, b"x", size=size)


def _record(text: bytes) -> bytes:
    """One that gives its own length, of two digits."""
    return b"%d %s\n" % (len(text) + 4, text)


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("sentinel",)


FIRST, LAST = _member("first.png", _png(1)), _member("last.png", _png(2)) + END
CODE = _member("a.pickle", pickle.dumps(_Payload())) + _member("b.pyd", b"\x7fELF") + _member("c.pth", b"import os")
ATTACKS = {  # the archive, the images found in it, what is said of the rest
    "traversal": (FIRST + _member("../../out.png", _png()) + LAST, ["first.png", "../../out.png", "last.png"], None),
    "absolute path": (FIRST + _member("/tmp/out.png", _png()) + LAST, ["first.png", "/tmp/out.png", "last.png"], None),
    "symlink": (FIRST + _member("link.png", kind=b"2", link="/etc/passwd") + LAST, ["first.png", "last.png"], None),
    "hard link": (FIRST + _member("link.png", kind=b"1", link="/etc/passwd") + LAST, ["first.png", "last.png"], None),
    "fifo": (FIRST + _member("fifo.png", kind=b"6", size=1 << 40) + LAST, ["first.png", "last.png"], None),
    "devices": (
        FIRST + _member("zero.png", kind=b"3") + _member("disk.png", kind=b"4") + LAST,
        ["first.png", "last.png"],
        None,
    ),
    "code": (FIRST + CODE + LAST, ["first.png", "last.png"], None),
    "a gigabyte": (FIRST + _member("big.png", _png(), size=1 << 30) + LAST, ["first.png"], "goes on behind the end"),
    "truncated": ((FIRST + LAST)[: len(FIRST) + BLOCK + 9], ["first.png"], "goes on behind the end"),
    "truncated header": ((FIRST + LAST)[: len(FIRST) + 300], ["first.png"], "no member's header at 1024"),
    "truncated between members": (FIRST, ["first.png"], "breaks off"),
    "hole of zeros": (FIRST + bytes(1 << 17) + LAST, ["first.png"], "ends at 1024 of"),
    "gz bomb": (gzip.compress(FIRST + bytes(20_000_000), 1), None, "compressed with gzip.*decompress it"),
    "same names": (FIRST + _member("first.png", _png(9)) + LAST, ["first.png", "last.png"], "1 members have the name"),
    "backwards": (FIRST + _member("back.png", size=-1024) + LAST, ["first.png"], "no member's header at 1024"),
    "backwards in pax": (FIRST + _pax(_record(b"size=-1024")) + LAST, ["first.png"], "no member's header"),
    "endless in pax": (FIRST + _pax(_record(b"size=99999999999999999999")) + LAST, ["first.png"], "behind the end"),
    "circular pax": (FIRST + _pax(b"0 path=x\n") + LAST, ["first.png"], "no record of an extended header"),
    "huge pax": (FIRST + _pax(b"", size=1 << 33) + LAST, ["first.png"], "goes on behind the end"),
    "long pax": (FIRST + _pax(b"3000000 comment=" + b"1" * 2999984) + LAST, ["first.png"], "header of 3000000 bytes"),
    "costly pax": (FIRST + _pax(b"1" * 900_000) + LAST, ["first.png"], "no record of an extended header"),
    "control characters": (_member("\x1b[31m.png", _png()) * 2 + LAST, ["\x1b[31m.png", "last.png"], r"as '\\x1b"),
    "no archive": (b"<html>404 not found</html>" * 99, None, "damaged after 0 images"),
    "nothing": (END, None, "no image in it.*remove it"),
}


def _opened(path: Path, notes: list[str]) -> Shards:
    return open_shards([str(path)], Store(path.parent / "store", 1.0), notes.append)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_archive_made_to_harm_is_read_as_far_as_it_goes_and_named(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, expected, told = ATTACKS[attack]
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    notes: list[str] = []
    started = time.perf_counter()
    if expected is None:
        with pytest.raises(InputError, match=f"{path}.*{told}"):
            _opened(path, notes)
    else:
        shards = _opened(path, notes)
        assert list(shards.names) == [f"shard.tar/{name}" for name in expected]
        levels = [int(shards.open(number, channels=1).unique()) for number in range(len(shards))]
        assert levels == [{"first.png": 1, "last.png": 2}.get(name, 0) for name in expected]
        assert len(notes) == (told is not None)
    assert time.perf_counter() - started < 2
    assert all(str(path) in note and note.isprintable() for note in notes)
    assert all(re.search(told or "", note) for note in notes)
    assert [file.name for file in tmp_path.iterdir()] == ["shard.tar"]


def test_an_image_too_long_to_be_one_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(FIRST + _member("big.png", size=1 << 30))
    with path.open("r+b") as file:
        file.truncate(len(FIRST) + BLOCK + (1 << 30) + len(END))  # a hole that costs no disk
    notes: list[str] = []
    shards = _opened(path, notes)
    with pytest.raises(ImageError, match=r"big\.png: 1073741824 bytes"):
        shards.read(1)
    assert not notes


def test_a_pickle_that_is_called_an_image_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = io.BytesIO()
    np.save(array, np.array([_Payload()], dtype=object), allow_pickle=True)
    path = tmp_path / "shard.tar"
    path.write_bytes(_member("a.npy", array.getvalue()) + _member("b.png", pickle.dumps(_Payload())) + LAST)
    shards = _opened(path, [])
    for number in range(2):
        with pytest.raises(ImageError, match=r"shard\.tar: [ab]\.(npy|png): "):
            shards.open(number)
    assert [file.name for file in tmp_path.iterdir()] == ["shard.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_any_bytes_are_kept(form, tmp_path):
    names = ["a b.png", "\u00e9.png", "e\u0301.png", "two\nlines.png", "\udcff.png", "d" * 90 + "/" + "e" * 90 + ".png"]
    names += ["x" * 251 + ".png", "deep/" * 60 + "y.png"] if form != tarfile.USTAR_FORMAT else []
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for level, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(_png(level)), 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(_png(level)))
    shards = _opened(path, [])
    assert list(scan(path).names) == names
    assert [int(shards.open(number, channels=1).unique()) for number in range(len(names))] == list(range(len(names)))


def test_images_of_macs_hidden_files_folders_and_sparse_files_are_no_images(tmp_path):
    others = _member("._first.png", b"x") + _member(".hidden.png", b"x") + _member("folder.png/", kind=b"5")
    sparse = _member("old.png", b"x", kind=b"S") + _pax(_record(b"GNU.sparse.major=1")) + _member("new.png", b"x")
    path = tmp_path / "shard.tar"
    path.write_bytes(FIRST + others + sparse + _member("pax", _record(b"comment=global"), b"g") + LAST)
    assert (list(scan(path).names), scan(path).problems) == (["first.png", "last.png"], [])


def test_any_mutation_of_an_archive_is_scanned_or_refused(tmp_path):
    pax = _pax(_record(b"path=renamed.png")) + _member("x.png", _png())
    long = _member("long", b"a" * 200 + b".png\0", b"L") + _member("y.png", _png())
    whole, path = FIRST + pax + long + LAST, tmp_path / "shard.tar"
    headers = [at for at in range(0, len(whole), BLOCK) if whole[at + 257 : at + 262] == b"ustar"]
    path.write_bytes(whole)
    assert len(scan(path).names) == 4
    for seed in range(500):
        data, draw = bytearray(whole), random.Random(seed)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        at = draw.choice(headers)
        data[at + draw.choice([124, 130, 135, 156])] = draw.choice(b"0127xgLKS\x80\xff-")
        if seed % 2:  # a header that is believed
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
        path.write_bytes(data[: draw.randrange(len(data))] if seed % 5 == 0 else data)
        with suppress(InputError):
            members = scan(path)
            assert members.lengths.min() >= 0
            assert 0 < members.offsets.min() <= (members.offsets + members.lengths).max() <= len(whole)
