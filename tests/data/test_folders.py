"""Which files of a folder are taken for images, whatever it holds besides."""

import os
import time
from pathlib import Path

import pytest

from tests.data.forms import folder, png
from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.data.decode import ImageError
from vae.data.sources import Source, folder_source


def _put(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def test_hidden_files_leavings_of_macs_and_sidecars_are_left_out(tmp_path):
    images = ["a.png", "b.JPG", "deep/er/c.webp", "deep/d.tiff", "f.npy", "g.tar.png", "h.x"]
    others = [".hidden.png", ".cache/a.png", "__MACOSX/._a.png", "deep/__MACOSX/a.png", "deep/._c.webp", "Thumbs.db"]
    sidecars = ["a.txt", "a.json", "a.png.txt", "a.xmp", "metadata.jsonl", "png", "b.jpg~", "c.png.part", ".png"]
    _put(tmp_path, *images, *others, *sidecars)
    assert list(folder_source(tmp_path).names) == sorted(images[:-1])


def test_links_to_files_and_folders_are_followed(tmp_path):
    _put(tmp_path, "elsewhere/a.png", "elsewhere/below/b.png", "one.png")
    root = tmp_path / "images"
    root.mkdir()
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "link").symlink_to(root)
    source = folder_source(tmp_path / "link")
    assert list(source.names) == ["file.png", "folder/a.png", "folder/below/b.png"]
    assert [source.open(index).shape for index in range(3)] == [(3, 8, 8)] * 3


def test_links_in_a_circle_end_and_show_each_image_once(tmp_path):
    _put(tmp_path, "a/1.png", "b/2.png")
    for link, target in {
        "a/up": tmp_path,
        "b/self": tmp_path / "b",
        "a/other": tmp_path / "b",
        "c": tmp_path / "a",
    }.items():
        (tmp_path / link).symlink_to(target)
    started = time.perf_counter()
    source = folder_source(tmp_path)
    assert list(source.names) == ["a/1.png", "b/2.png"]
    assert time.perf_counter() - started < 2


def test_what_is_no_file_is_refused_when_it_is_opened(tmp_path):
    _put(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.png")
    source = folder_source(tmp_path)
    for index, reason in ((1, "No such file"), (2, "not a regular file")):
        with pytest.raises(ImageError, match=rf"{source.names[index]}: {reason}"):
            source.open(index)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folders_for_training_and_validation_are_taken_at_their_word(name, tmp_path):
    folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    sources = open_sources(DataConfig(root=str(tmp_path)))
    assert [(len(source), source.names[0]) for source in sources] == [(12, "00.png"), (3, "12.png")]


def test_a_folder_named_for_validation_alone_is_divided_like_any_other(tmp_path):
    _put(tmp_path, "val/a.png", "val/b.png", "other/c.png")
    sources = open_sources(DataConfig(root=str(tmp_path), validation_fraction=1e-9))
    assert sorted(_names(*sources)) == ["other/c.png", "val/a.png", "val/b.png"]
    assert [len(source) for source in sources] == [2, 1]


def test_twenty_thousand_names_are_found_and_divided_within_seconds(tmp_path):
    for part in range(20):
        (tmp_path / f"{part:02d}").mkdir()
        for number in range(1000):
            (tmp_path / f"{part:02d}" / f"{number:05d}.png").touch()
    started = time.process_time()
    sources = open_sources(DataConfig(root=str(tmp_path), validation_images=None))
    assert time.process_time() - started < 5
    assert len(set(_names(*sources))) == 20_000
    assert 300 < len(sources[1]) < 500


def _names(*sources: Source) -> list[str]:
    return [name for source in sources for name in source.names]
