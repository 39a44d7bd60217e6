"""Lists of images: what is taken as a path, and what is refused in one line with the remedy."""

import os
import random
import re
from pathlib import Path

import pytest

from tests.data.forms import png
from vae.data.sources import list_source
from vae.errors import InputError

GARBAGE = random.Random(0).randbytes(5000)
NAMES = ["a.png", "b c.png", "00017.png", "d,e.png", 'f"g.png', "\u00e9.png", "h/../a.png", " i.png", "NA", "null"]
READ = {  # content, names
    "plain.txt": ("\n".join(NAMES), NAMES),
    "blank.txt": ("\n\na.png\n\nb.png\n\n", ["a.png", "b.png"]),
    "windows.txt": ("\ufeffa.png\r\nb.png\r\n", ["a.png", "b.png"]),
    "upper.TXT": ("a.png", ["a.png"]),
    "bytes.txt": (b"a.png\n\xff\xfe.png\n", ["a.png", "\udcff\udcfe.png"]),
    "plain.csv": ("path\na.png\nb.png\n", ["a.png", "b.png"]),
    "windows.csv": ("\ufefflabel,path\r\n1,a.png\r\n2,b.png\r\n", ["a.png", "b.png"]),
    "quoted.csv": (
        '"path","x"\n"a.png",1\n"d,e.png",2\n"f""g.png",3\n"h\ni.png",4\n',
        ["a.png", "d,e.png", 'f"g.png', "h\ni.png"],
    ),
    "changing.csv": ("file,label\na.png,1\nb.png,\nc.png,text\n", ["a.png", "b.png", "c.png"]),
    "numbers.csv": ("label,file_name\na,00001\nb,00002\n", ["00001", "00002"]),
    "cells.csv": ("path,x\na.png,1\n,2\nNA,3\n", ["a.png", "NA"]),
    "bytes.csv": (b"path,x\na.png,\xff\n\xff.png,1\n", ["a.png", "\udcff.png"]),
    "first.csv": ("image,file,x\n1,a.png,2\n", ["a.png"]),
    "plain.jsonl": ('{"path": "a.png"}\n{"path": "b\\n\\u00e9.png"}\n', ["a.png", "b\n\u00e9.png"]),
    "changing.jsonl": ('{"x": 1, "path": "a.png"}\n\n{"path": "b.png", "x": {"y": []}}\n', ["a.png", "b.png"]),
    "gaps.jsonl": ('{"path": "a.png"}\n{"x": 1}\n{"path": null}\n{"path": "b.png"}', ["a.png", "b.png"]),
    "windows.jsonl": ('\ufeff{"image": "a.png"}\r\n{"image": "b.png"}\r\n', ["a.png", "b.png"]),
}
WRONG = {  # content, column, what is said
    "a.xls": ("x", None, r"an unknown kind of list, expected \.txt"),
    "empty.txt": ("", None, r"no path in it; put one on each line"),
    "blank.txt": ("\n\n\n", None, r"no path in it; put one on each line"),
    "empty.csv": ("", None, r"no path in it; put one on each line"),
    "header.csv": ("path,label\n", None, r"no path in it; put one on each line"),
    "cells.csv": ("path,label\n,1\n,2\n", None, r"no path in it; put one on each line"),
    "nulls.jsonl": ('{"path": null}\n', None, r"no path in it; put one on each line"),
    "headless.csv": ("a.png,1\n", None, r"its columns are \['a\.png', '1'\].* file_name.*: name one by data\.column"),
    "column.csv": ("path\na.png\n", "x", r"its columns are \['path'\]; looked for 'x': name one by data\.column"),
    "column.jsonl": ('{"path": "a.png"}', "x", r"its columns are \['path'\]; looked for 'x': name one by data\.column"),
    "column.txt": ("a.png", "x", r"data\.column='x': .* has no columns; leave it out"),
    "ragged.csv": ("path,x\na.png,1\na.png,1,2\n", None, r"not readable as \.csv .*got 3.*; mend or remove that line"),
    "garbage.csv": (GARBAGE, None, r"its columns are \[.*: name one by data\.column"),
    "garbage.jsonl": (GARBAGE, None, r"not readable as \.jsonl .*; mend or remove that line"),
    "garbage.txt": (
        GARBAGE,
        None,
        r"its first image .* is not there; relative|not readable as \.txt .*; mend or remove",
    ),
    "prose.txt": ("word " * 200, None, r"its first image '.*word.* is not there; relative paths are below"),
    "null.txt": (b"a\0b.png", None, r"its first image '.*' is not there; relative paths are below"),
    "numbers.jsonl": ('{"path": 3}', None, r"not readable .*from string to number.*; mend or remove that line"),
    "broken.jsonl": ('{"path": "a.png"}\n{"path', None, r"not readable as \.jsonl.*; mend or remove that line"),
    "arrays.jsonl": ('["a.png"]', None, r"its columns are \[\]; looked for.*: name one by data\.column"),
    "absent.txt": ("b.png", None, r"its first image '.*/b\.png' is not there; relative paths are below"),
}


def _written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("name", READ)
def test_a_list_gives_its_paths_in_their_order(name, tmp_path):
    content, expected = READ[name]
    (tmp_path / expected[0]).write_bytes(png(0))
    source = list_source(_written(tmp_path / name, content), None)
    assert list(source.names) == expected
    assert [source.label(index) for index in range(len(source))] == [str(tmp_path / name) for name in expected]
    assert source.open(0).shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_column_can_be_named(name, tmp_path):
    content = {"a.csv": "path,where\nx,a.png\n", "a.jsonl": '{"path": "x", "where": "a.png"}'}[name]
    (tmp_path / "a.png").write_bytes(png(0))
    assert list(list_source(_written(tmp_path / name, content), "where").names) == ["a.png"]


def test_paths_may_be_absolute_and_a_list_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "a.png").write_bytes(png(0))
    _written(tmp_path / "home" / "list.txt", f"{tmp_path}/a.png\n../a.png\n")
    source = list_source("~/list.txt", None)
    assert [source.open(index).shape for index in range(2)] == [(3, 8, 8)] * 2


def test_a_list_longer_than_a_block_keeps_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr("vae.data.sources.BLOCK", 1000)
    names = [f"{number:05d}.png" for number in range(3000)]
    (tmp_path / names[0]).write_bytes(png(0))
    for name, lines in {
        "a.txt": names,
        "a.csv": ["path,label", *(f'"{name}","two\nlines"' for name in names)],
        "a.jsonl": [f'{{"path": "{name}"}}' for name in names],
    }.items():
        assert list(list_source(_written(tmp_path / name, "\n".join(lines)), None).names) == names


@pytest.mark.parametrize("name", WRONG)
def test_a_list_that_cannot_be_used_is_refused_in_one_line_with_the_remedy(name, tmp_path):
    content, column, told = WRONG[name]
    (tmp_path / "a.png").write_bytes(png(0))
    file = _written(tmp_path / name, content)
    with pytest.raises(InputError, match=rf"data\.root='{re.escape(os.fspath(file))}'.*({told})|{told}") as error:
        list_source(file, column)
    assert str(error.value).isprintable()
    assert file.name in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["absent.txt", "folder"])
def test_a_list_that_is_no_file_is_refused_by_its_key(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"data\.validation_root='.*{name}': no such file; name a \.txt"):
        list_source(tmp_path / name, None, key="data.validation_root")
