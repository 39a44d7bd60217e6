"""What is missing, empty or wrong is refused in one line, which names what was given and what to do."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.forms import Given, folder, hub, parquet, png, table, tars
from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.errors import InputError

GARBAGE = random.Random(0).randbytes(5000)
SHARD = {"source": "webdataset"}
HUB = {"source": "huggingface"}
Form = Callable[[Path], Given]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr("vae.data.remote.WAIT_SECONDS", 0.0)


def _file(name: str, content: bytes, **more: Any) -> Form:
    """A file, with an image beside it."""

    def write(root: Path) -> Given:
        root.mkdir()
        (root / "a.png").write_bytes(png(0))
        (root / name).write_bytes(content)
        return {"root": str(root / name), **more}

    return write


def _named(pattern: str, **more: Any) -> Form:
    return lambda root: {"root": pattern.format(root=root), **more}


def _and(form: Form, **more: Any) -> Form:
    return lambda root: form(root) | more


def _folder_of(*names: str) -> Form:
    def write(root: Path) -> Given:
        for name in names:
            (root / name).mkdir(parents=True)
            (root / name / "a.txt").touch()
        return {"root": str(root)}

    return write


def _inside(root: Path) -> Given:
    return folder(root) | {"validation_root": str(root / "val")}


def _paths_in_a_table(root: Path) -> Given:
    """What `to_parquet` writes of images that are files: their paths."""
    folder(root)
    rows = [{"bytes": None, "path": str(root / "train" / "00.png")}]
    images = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images}), root / "a.parquet")
    return {"root": str(root / "a.parquet"), "streaming": True, **HUB}


def _two_columns(root: Path) -> Given:
    root.mkdir()
    rows = table("train").cast_column("image", datasets.Image(decode=False))
    both = datasets.Dataset.from_dict({"image": rows["image"], "mask": rows["image"]})
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    both.cast(features).to_parquet(str(root / "a.parquet"))
    return {"root": str(root / "a.parquet"), **HUB}


def _indexed(index: str, **parts: str) -> Form:
    def write(root: Path) -> Given:
        given = tars(root)
        (root / "index.json").write_text(index)
        return given | {key: str(root / name) for key, name in parts.items()}

    return write


def _no_rows(root: Path) -> Given:
    root.mkdir()
    empty = table("train").select([])
    empty.to_parquet(str(root / "a.parquet"))
    with pa.ipc.new_stream(root / "a.arrow", empty.data.schema):
        return {"root": str(root / "a.arrow"), **HUB}


WRONG: dict[str, tuple[Form, str]] = {  # how it comes to be, what is said of it
    "no folder": (_named("{root}/none"), r"data\.root='.*/none': no such folder; name an existing"),
    "a file": (_file("a.txt", b""), r"data\.root='.*a\.txt': no such folder; name"),
    "empty folder": (_folder_of("images"), r"data\.root='.*': nothing in it or below to read \(looked for .*\.png"),
    "empty part": (_folder_of("train", "val"), r"data\.root='.*/train': nothing in it"),
    "two validations": (
        _folder_of("train", "val", "valid"),
        r"data\.root=.*val and valid; name one by data\.validation_",
    ),
    "validation inside": (_inside, r"data\.validation_root='.*val' and data\.root=.*one in the other.*; name folders"),
    "no data set": (_named("{root}/none", **HUB), r"data\.root='.*/none': not to be had as a data set .*; name one of"),
    "empty data set": (_and(_folder_of("a"), **HUB), r"data\.root=.*: not to be had as a data set .*; name one of"),
    "no rows": (_no_rows, r"data\.root='.*': no rows in data\.split='train'; name another split"),
    "no rows to stream": (
        lambda root: _no_rows(root) | {"root": str(root / "a.parquet"), "streaming": True},
        r"a\.parquet: no image in it or in any other of 1 shards; name others",
    ),
    "no split": (_and(parquet, split="test"), r"data\.root=.*Unknown split.*data\.split='test' names the split"),
    "no split to stream": (
        _and(parquet, split="test", streaming=True),
        r"data\.split='test': .* has train, validation; name one",
    ),
    "no column": (_and(parquet, column="x"), r"data\.column='x': the columns are label, image; name one of them"),
    "numbers as images": (_and(parquet, column="label"), r"data\.column='label': no images \(Value\); name a column"),
    "two columns": (
        _two_columns,
        r"data\.column is not set, and there are 2 columns of images .*image, mask; name one",
    ),
    "two columns to stream": (
        _and(_two_columns, streaming=True, validation_split="train"),
        r"a\.parquet: 2 columns of images, .*image, mask; name one by data\.column",
    ),
    "images to stream": (
        lambda root: folder(root) | hub(root) | {"streaming": True, "validation_split": None},
        r"data\.root=.*data\.streaming=true: .*png is neither \.parquet nor \.tar; data\.streaming=false",
    ),
    "paths to stream": (
        _and(_paths_in_a_table, validation_split="train"),
        r"a\.parquet: no images in its rows, or only paths of some; write the table with embedded images",
    ),
    "garbage parquet": (
        _file("a.parquet", GARBAGE, **HUB),
        r"data\.root=.*not to be had as a data set .*; name one of",
    ),
    "garbage to stream": (
        _file("a.parquet", GARBAGE, **HUB, streaming=True),
        r"a\.parquet: not readable as parquet .*; rep",
    ),
    "no match": (_named("{root}/*.tar", **SHARD), r"data\.root='.*\*\.tar': nothing matches; name existing shards"),
    "no match in memory": (_named("memory:/{root}/*.tar", **SHARD), r"data\.root='.*\*\.tar': nothing matches; name"),
    "no shard": (
        _and(tars, root="{0..9}.tar"),
        r"data\.root='\{0\.\.9\}\.tar': 0\.tar is not there; name existing shards",
    ),
    "no shard there": (
        _named("memory:/{root}/a.tar", **SHARD),
        r"memory:.*a\.tar: cannot be fetched .*; check the address",
    ),
    "unknown protocol": (
        _named("nope://a.tar", **SHARD),
        r"nope://a\.tar: cannot be fetched .*nope.*; check the address",
    ),
    "shards in a folder": (_and(_folder_of("a"), **SHARD), r"data\.root=.*is a folder; name existing shards, as"),
    "unbalanced": (_named("{root}/{{0..9.tar", **SHARD), r"data\.root=.*: its braces do not match; write \{000"),
    "command": (_named("pipe:cat a.tar", **SHARD), r"data\.root='pipe:cat a\.tar': commands are not run; name files"),
    "single shard": (
        lambda root: tars(root, shards=1) | {"validation_root": None},
        r"data\.root=.*: a single shard cannot be divided; name another by data\.validation_root",
    ),
    "single table": (
        lambda root: {**_two_columns(root), "streaming": True},
        r"data\.root=.*: a single shard cannot be divided; name another by data\.validation_split",
    ),
    "no archive": (_file("a.tar", GARBAGE, **SHARD), r"a\.tar: damaged after 0 images .*; replace or remove it"),
    "no validation": (
        _and(tars, validation_root="none.tar"),
        r"data\.validation_root='none\.tar': none\.tar is not there",
    ),
    "garbage index": (_indexed("[]"), r"index\.json: not an index of shards \(TypeError\); remove it"),
    "old index": (
        _indexed('{"shards": [{"name": "train-0.tar", "images": 9}]}', root="train-0.tar", validation_root="val-0.tar"),
        r"train-0\.tar: 4 images, expected 9; the shard is damaged or was changed: restore it, or make its index anew",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_in_one_line_with_the_remedy(case, tmp_path):
    write, told = WRONG[case]
    config = DataConfig(**write(tmp_path / "images"), cache=str(tmp_path / "cache"))
    with pytest.raises(InputError) as error:
        open_sources(config)[0].open(0)
    message = str(error.value)
    assert re.search(told, message), message
    assert message.isprintable()
    assert len(message) < 1000
