"""Jobs of many shards: what is refused, what is made again, and whose fault it is."""

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.datasets.conftest import contents
from vae.data import decode
from vae.data.decode import ImageError
from vae.data.sources import Files
from vae.datasets.jobs import unreadable
from vae.distributed import place, spread
from vae.errors import InputError


@pytest.mark.parametrize("harm", ["remove", "cut", "no receipt", "half a receipt", "another receipt"])
def test_a_shard_that_is_not_as_it_was_written_is_made_again(call, pictures, tmp_path, harm):
    command = ("prepare", pictures, tmp_path / "out", "--shard-images", 3)
    call(*command)
    before = contents(tmp_path / "out")
    shard, receipt = tmp_path / "out" / "000001.tar", tmp_path / "out" / "000001.json"
    if harm == "remove":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "no receipt":
        receipt.unlink()
    elif harm == "another receipt":
        receipt.write_text(receipt.read_text().replace('"recipe": "', '"recipe": "0'))
    else:
        receipt.write_text(receipt.read_text()[:100])
    assert call(*command) == 0
    assert contents(tmp_path / "out") == before


def test_what_is_finished_is_not_done_twice(call, capsys, monkeypatch, pictures, tmp_path):
    command = ("prepare", pictures, tmp_path / "out", "--shard-images", 3)
    call(*command)
    monkeypatch.setattr(Files, "read", None)
    assert call(*command) == 0
    assert "3 of 3 shards are there already" in capsys.readouterr().out


def test_another_recipe_in_the_same_folder_is_refused_and_what_differs_is_named(call, capsys, pictures, tmp_path):
    command = ("prepare", pictures, tmp_path / "out", "--resolution", 32)
    call(*command)
    before = contents(tmp_path / "out")
    assert call(*command, "--quality", 90, "--min-side", 20) == 2
    assert "begun with min_side None, quality 95; give what it was begun with" in capsys.readouterr().err
    (pictures / "new.png").write_bytes((pictures / "a.png").read_bytes())
    assert call(*command) == 2
    assert "begun with other images (some were added, removed or renamed), images 8;" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_folder_that_holds_other_shards_is_left_alone(call, capsys, pictures, tmp_path):
    call("prepare", pictures, tmp_path / "out")
    (tmp_path / "out" / "recipe.json").unlink()
    before = contents(tmp_path / "out")
    assert call("prepare", tmp_path / "out" / "*.tar", tmp_path / "out") == 2
    assert "holds 000000.tar, which would be lost; choose another folder" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "tiff"), "--format tiff, expected one of ['jpeg', 'webp', 'png']"),
        (("--format", "png", "--quality", 90), "--quality 90 with --format png, expected it with jpeg or webp"),
        (("--quality", 0), "--quality 0, expected 1 to 100"),
        (("--min-side", 0), "--min-side 0, expected 1 or more"),
        (("--max-aspect", 0.5), "--max-aspect 0.5, expected 1 to 20"),
        (("--max-corrupt", 2), "--max-corrupt 2.0, expected a share from 0 to 1"),
        (("--min-side", 500), "no image is left of 8; dropped.jsonl in it says why"),
        (("--source", "cloud"), "--source cloud, expected one of ['folder', 'huggingface'"),
        (("--split", "test"), "--split test, expected it with --source huggingface only"),
        (("--streaming",), "--streaming, expected it with --source huggingface only"),
        (("--column", "x"), "--column x, expected it with huggingface or list"),
        (("--source", "huggingface", "--column", "x"), "--column='x': the columns are image"),
    ],
)
def test_refused_options_are_one_line_and_status_two(call, capsys, pictures, tmp_path, arguments, message):
    assert call("prepare", pictures, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "SRC='nowhere': not there; name a folder, a list, tar shards; --source huggingface takes it"),
        ("nowhere.txt", "SRC='nowhere.txt': no such file"),
        ("nowhere/*.tar", "SRC='nowhere/*.tar': nothing"),
        (__file__, "not a list or shard of images"),
    ],
)
def test_sources_that_are_none_are_refused_by_name(call, capsys, tmp_path, source, message):
    assert call("prepare", source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_shard_of_mostly_unreadable_images_stops_the_work_unless_that_is_allowed(call, capsys, tmp_path, pictures):
    for number in range(12):
        (pictures / f"x{number}.png").write_text("no image")
    assert call("prepare", pictures, tmp_path / "out") == 2
    assert "12 of the images 0 to 19 cannot be read, the first: x0.png: no image" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "out")) == ["recipe.json"]
    assert call("prepare", pictures, tmp_path / "out", "--max-corrupt", 1) == 0


@pytest.mark.parametrize("where", [(Files, "read"), (decode, "check_status")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_machine_that_fails_costs_no_image(call, capsys, monkeypatch, pictures, tmp_path, workers, where):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    options = ("--workers", workers, "--shard-images", 4)
    with monkeypatch.context() as patched:
        patched.setattr(*where, failing)
        assert call("prepare", pictures, tmp_path / "out", *options) == 2
    assert "a.png: Input/output error; see to the machine and give the command again" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "out")) == ["recipe.json"]
    assert call("prepare", pictures, tmp_path / "out", *options) == 0


def test_a_worker_that_is_killed_ends_the_work_with_a_reason():
    with pytest.raises(InputError, match=r"a worker was ended by signal 9, .* lower --workers"):
        spread(lambda shard, _: os.kill(os.getpid(), signal.SIGKILL), [0, 1], 2, int)


def test_a_worker_that_fails_ends_the_work(capfd):
    with pytest.raises(RuntimeError, match="a worker failed"):
        spread(lambda shard, _: 1 // shard, [0, 1], 2, int)
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("rank", ["2", "-1", "one"])
def test_a_rank_that_cannot_be_is_refused(monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place().world == 1
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match=f"RANK={rank}, WORLD_SIZE=2 in the environment, expected"):
        place()


def test_a_reason_is_the_same_wherever_and_however_often_an_image_is_read():
    error = ImageError("/there/x.png: cannot identify <_io.BytesIO object at 0x7fecf9fbc400>; replace it")
    source = Files(Path("/there"), ["x.png"])
    assert unreadable(source, 0, error).message == "x.png: cannot identify <_io.BytesIO>; replace it"
