"""Copies of files that are somewhere else: each fetched once and whole, their folder no larger than allowed."""

import errno
import io
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from tests.data.forms import IMAGES, png, tars
from vae.data.remote import ABANDONED_SECONDS, Store, expand
from vae.data.shards import Shards, open_shards
from vae.errors import InputError

FORK = multiprocessing.get_context("fork")
SIZE = 1000


class Remote(AbstractFileSystem):
    """`remote://` followed by a path: notes each opening, takes its time, and fails when it is told to."""

    protocol = "remote"
    cachable = False
    notes = Path()
    seconds = 0.0
    failures = 0
    error: Exception = OSError("the line is dead")

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        with Remote.notes.open("a") as notes:
            notes.write(f"{path}\n")
        return _File(path)


class _File(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        time.sleep(Remote.seconds)
        if self.tell() and Remote.failures:
            Remote.failures -= 1
            raise Remote.error
        return super().read(SIZE // 2 if size and size > 0 else size)


@pytest.fixture(autouse=True)
def _remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("remote", Remote, clobber=True)
    monkeypatch.setattr("vae.data.remote.WAIT_SECONDS", 0.0)
    for name, value in {"notes": tmp_path / "notes", "seconds": 0.0, "failures": 0, "error": Remote.error}.items():
        monkeypatch.setattr(Remote, name, value)
    (tmp_path / "far").mkdir()


def _urls(tmp_path: Path, count: int) -> list[str]:
    for number in range(count):
        (tmp_path / "far" / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    return [f"remote://{tmp_path}/far/{number}.tar" for number in range(count)]


def _fetched(tmp_path: Path) -> list[str]:
    """The names of files, each as often as it was opened."""
    notes = tmp_path / "notes"
    return [Path(line).name for line in notes.read_text().splitlines()] if notes.exists() else []


def _store(tmp_path: Path, size: float = 1e9) -> Store:
    return Store(tmp_path / "store", size / 1e9)


def _kept(tmp_path: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[2] for path in (tmp_path / "store").glob("[!.]*"))


def test_a_file_is_fetched_once_by_many_processes_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "seconds", 0.05)
    (url,) = _urls(tmp_path, 1)
    with FORK.Pool(6) as pool:
        copies = pool.map(_store(tmp_path).local, [url] * 12)
    assert _fetched(tmp_path) == ["0.tar"]
    assert {copy.read_bytes() for copy in copies} == {bytes(SIZE)}


def test_the_folder_stays_below_its_limit_and_lets_go_of_what_was_used_longest_ago(tmp_path):
    urls, store, draw = _urls(tmp_path, 8), _store(tmp_path, 3.5 * SIZE), random.Random(0)
    used: list[int] = []
    for number in (draw.randrange(8) for _ in range(60)):
        assert store.local(urls[number]).read_bytes() == bytes([number]) * SIZE
        used = [*(other for other in used if other != number), number][-3:]
        assert _kept(tmp_path) == sorted(f"{other}.tar" for other in used)


def test_one_file_larger_than_the_limit_is_kept_while_it_is_the_only_one(tmp_path):
    urls, store = _urls(tmp_path, 2), _store(tmp_path, 0.5 * SIZE)
    for url in urls:
        assert len(store.local(url).read_bytes()) == SIZE
    assert _kept(tmp_path) == ["1.tar"]


def test_a_fetch_that_fails_is_tried_again_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "failures", 3)
    (url,) = _urls(tmp_path, 1)
    assert _store(tmp_path).local(url).read_bytes() == bytes(SIZE)
    assert len(_fetched(tmp_path)) == 4


@pytest.mark.parametrize(
    ("error", "tries", "told"),
    [
        (OSError("the line is dead"), 4, r"cannot be fetched \(OSError: the line is dead\); check the address"),
        (PermissionError(errno.EACCES, "not for you"), 1, r"cannot be fetched \(PermissionError.*not for you"),
        (OSError(errno.ENOSPC, "No space left"), 1, r"cannot be kept in .*/store \(No space left\).*data\.cache"),
    ],
)
def test_a_fetch_that_fails_for_good_is_refused_by_its_url_and_leaves_nothing(
    error, tries, told, tmp_path, monkeypatch
):
    monkeypatch.setattr(Remote, "failures", 99)
    monkeypatch.setattr(Remote, "error", error)
    (url,) = _urls(tmp_path, 1)
    with pytest.raises(InputError, match=f"^{url}: {told}"):
        _store(tmp_path).local(url)
    assert len(_fetched(tmp_path)) == tries
    assert [file.suffix for file in (tmp_path / "store").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made_is_refused_with_the_key_that_names_another(tmp_path):
    (url,) = _urls(tmp_path, 1)
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match=r"0\.tar: cannot be kept in .*store .*name another folder by data\.cache"):
        _store(tmp_path).local(url)


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_copy(tmp_path, monkeypatch):
    urls, store = _urls(tmp_path, 2), _store(tmp_path)
    monkeypatch.setattr(Remote, "seconds", 0.3)
    process = FORK.Process(target=store.local, args=(urls[0],))
    process.start()
    while not list((tmp_path / "store").glob(".*.fetched")):
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.join()
    monkeypatch.setattr(Remote, "seconds", 0.0)
    (left,) = (tmp_path / "store").glob(".*.fetched")
    assert left.stat().st_size < SIZE
    assert not _kept(tmp_path)
    os.utime(left, (0, time.time() - 2 * ABANDONED_SECONDS))
    store.local(urls[1])
    assert not left.exists()
    assert store.local(urls[0]).read_bytes() == bytes(SIZE)


def test_what_is_open_is_read_to_its_end_after_it_was_removed(tmp_path):
    urls, store = _urls(tmp_path, 2), _store(tmp_path, SIZE)
    with store.local(urls[0]).open("rb") as file:
        store.local(urls[1])
        assert _kept(tmp_path) == ["1.tar"]
        assert file.read() == bytes(SIZE)


def _shards(tmp_path: Path, at_once: int) -> Shards:
    """Of which the store keeps one."""
    tars(tmp_path / "far")
    urls = expand(f"remote://{tmp_path}/far/train-{{0..2}}.tar", "data.root")
    return open_shards(urls, _store(tmp_path, SIZE), print, at_once=at_once)


@pytest.mark.parametrize(("at_once", "fetches"), [(3, {0}), (1, {5, 6})])  # counting has left one of them open
def test_shards_in_use_stay_open_and_are_not_fetched_again(at_once, fetches, tmp_path):
    shards = _shards(tmp_path, at_once)
    (tmp_path / "notes").unlink()
    for index in (0, 4, 8, 1, 5, 9):
        assert shards.read(index) == png(int(Path(shards.name(index)).stem))
    archives = [name for name in _fetched(tmp_path) if name.endswith(".tar")]
    assert len(archives) in fetches


def test_an_open_shard_that_is_read_counts_as_used(tmp_path):
    shards = open_shards(_shards(tmp_path, at_once=3).urls, _store(tmp_path), print)
    for index in (0, 4, 8, 1):
        shards.read(index)
    size = (tmp_path / "far" / "val-0.tar").stat().st_size
    _store(tmp_path, 2.5 * size).local(f"remote://{tmp_path}/far/val-0.tar")
    assert {path.name[33:] for path in (tmp_path / "store").glob("[!.]*")} == {"train-0.tar", "val-0.tar"}


def _read_all(shards: Shards) -> bool:
    order = random.Random(os.getpid()).choices(range(IMAGES), k=60)
    return all(shards.read(index) == png(int(Path(shards.name(index)).stem)) for index in order)


def test_processes_that_take_each_others_copies_away_read_on(tmp_path):
    shards = _shards(tmp_path, at_once=1)
    with FORK.Pool(4) as pool:
        assert all(pool.map(_read_all, [shards] * 8))
