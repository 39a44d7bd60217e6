"""Shards by patterns and by their index, near and far, as archives and as tables."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.forms import IMAGES, parquet, png, tars
from vae.data.decode import ImageError, open_image
from vae.data.remote import Store, expand
from vae.data.shards import Shards, open_shards
from vae.errors import InputError

THREE = [f"train-{number}.tar" for number in range(3)]


def _open(tmp_path: Path, urls: list[str], notes: list[str] | None = None, at_once: int = 16) -> Shards:
    return open_shards(urls, Store(tmp_path / "store", 1.0), ([] if notes is None else notes).append, None, at_once)


def _found(pattern: str) -> list[str]:
    return [Path(url).name for url in expand(pattern, "data.root")]


def _levels(shards: Shards) -> list[int]:
    return [int(shards.open(index).sum()) for index in range(len(shards))]


def _held(folder: Path) -> list[str]:
    """The files below it that this process has open."""
    names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sorted(Path(name).name for name in names if name.startswith(str(folder)))


@pytest.mark.parametrize("address", ["{root}", "memory://patterns{root}", "file://{root}"])
def test_patterns_are_braces_and_globs_near_and_far(address, tmp_path):
    tars(tmp_path, address=address)
    (tmp_path / "._train-0.tar").touch()
    base = address.format(root=tmp_path)
    assert expand(f"{base}/train-{{2..0}}.tar", "data.root") == [f"{base}/{name}" for name in THREE[::-1]]
    assert _found(f"{base}/train-*.tar") == _found(f"{base}/*n-[012].tar") == THREE
    assert _found(f"{base}/{{val-0,train-[12]}}.tar") == ["val-0.tar", *THREE[1:]]
    assert _found(f"{base}/train-1.tar") == THREE[1:2]
    assert _levels(_open(tmp_path, expand(f"{base}/train-*.tar", "data.root")))


def test_names_that_look_like_patterns_are_taken_as_they_are(tmp_path):
    tars(tmp_path / "{a,b}[1]*")
    assert _found(f"{tmp_path}/{{a,b}}[1]*/train-0.tar") == THREE[:1]
    signed = "https://host/a.tar?signature=x*y[1]"
    assert expand(signed, "data.root") == [signed]


def test_the_index_beside_shards_spares_a_look_into_each(tmp_path):
    urls = expand(tars(tmp_path / "near")["root"], "data.root")
    counted = _open(tmp_path, urls)
    entries = [{"name": Path(url).name, "images": 4} for url in urls]
    (tmp_path / "near" / "index.json").write_text(json.dumps({"shards": [*entries, {"name": "other", "images": 9}]}))
    whole = [Path(url).read_bytes() for url in urls]
    for url in urls:
        Path(url).write_bytes(b"")
    indexed = _open(tmp_path, urls)
    assert indexed.counts == counted.counts
    with pytest.raises(InputError, match=r"train-1\.tar: damaged after 0 images"):
        indexed.read(5)
    for url, data in zip(urls, whole, strict=True):
        Path(url).write_bytes(data)
    assert _levels(indexed) == _levels(counted)
    (tmp_path / "near" / "index.json").write_text(json.dumps({"shards": entries[:2]}))
    assert _open(tmp_path, urls).counts == [4, 4, 4]


def test_a_damaged_shard_is_named_by_its_address_and_used_as_far_as_it_goes(tmp_path):
    urls = expand(tars(tmp_path, address="memory://damaged{root}")["root"], "data.root")
    filesystem, path = fsspec.core.url_to_fs(urls[1])
    filesystem.pipe_file(path, filesystem.cat_file(path)[:2000])
    notes: list[str] = []
    assert _open(tmp_path, urls, notes).counts == [4, 1, 4]
    assert [note.startswith(f"{urls[1]}: damaged after 1 images (") for note in notes] == [True]


def test_tables_with_rows_without_an_image_keep_their_numbers(tmp_path):
    rows = [None, {"bytes": png(1), "path": "a"}, {"bytes": None, "path": "b"}, {"bytes": png(3), "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"md5": [b"x"] * 4, "image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    shards = _open(tmp_path, [str(tmp_path / "a.parquet")])
    assert (shards.read(1), shards.read(3)) == (png(1), png(3))
    for index in (0, 2):
        with pytest.raises(ImageError, match=rf"a\.parquet: 0000000{index}\.jpg: 0 bytes"):
            shards.read(index)
    assert list(shards.names) == [f"a.parquet/{number:08d}.jpg" for number in range(4)]


def test_no_more_archives_are_open_than_allowed_and_none_when_they_are_gone(tmp_path):
    shards = _open(tmp_path, expand(tars(tmp_path / "near")["root"], "data.root"), at_once=2)
    for index in (0, 4, 8):
        shards.read(index)
    assert _held(tmp_path / "near") == THREE[1:]


def test_files_of_the_users_are_left_as_they_are_and_read_anew_where_they_changed(tmp_path):
    given = parquet(tmp_path / "near")
    tars(tmp_path / "near")
    urls = expand(f"{given['root']}/train-*", "data.root")
    before = [Path(url).stat().st_mtime_ns for url in urls]
    shards = _open(tmp_path, urls)
    levels = _levels(shards)
    assert sorted(levels) == sorted([int(open_image(png(number)).sum()) for number in range(IMAGES)] * 2)
    assert [Path(url).stat().st_mtime_ns for url in urls] == before
    first, other = [url for url in urls if url.endswith(".parquet")][:2]
    Path(first).write_bytes(Path(other).read_bytes())
    ours = np.array_split(levels, len(urls))
    assert _levels(_open(tmp_path, [first])) == ours[urls.index(other)].tolist() != ours[urls.index(first)].tolist()
