"""`vae prepare`: what comes out is the stated filter of what went in, whoever does it, and it trains."""

import io
import json
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from tests.conftest import read_json, without_adversary
from tests.datasets.conftest import SIZES, contents
from vae.config.compose import compose
from vae.data.build import open_sources
from vae.data.decode import open_image
from vae.data.transforms import center_crop
from vae.training.train import train

NAMES = sorted(SIZES)


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def by_name(folder: Path) -> dict[str, bytes]:
    """{name in the source: bytes}, by the number that a member's name begins with."""
    return {NAMES[int(name[:8])]: data for name, data in members(folder).items()}


def as_pillow_would(path: Path, short: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    if min(image.size) > short:
        width, height = image.size
        image = image.resize(
            (int(width * short / min(image.size)), int(height * short / min(image.size))), Image.Resampling.BICUBIC
        )
    return np.asarray(image)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_png_shards_hold_exactly_pillows_bicubic_and_nothing_is_enlarged(call, pictures, tmp_path):
    assert call("prepare", pictures, tmp_path / "out", "--resolution", 32, "--format", "png") == 0
    made = by_name(tmp_path / "out")
    assert sorted(made) == NAMES
    for name, data in made.items():
        assert np.array_equal(pixels(data), as_pillow_would(pictures / name, 32)), name
    assert pixels(made["d.png"]).shape == (20, 18, 3)


def test_validation_sees_the_same_square_before_and_after(call, pictures, tmp_path):
    call("prepare", pictures, tmp_path / "out", "--resolution", 24, "--format", "png")
    for name, data in by_name(tmp_path / "out").items():
        assert torch.equal(center_crop(open_image(data), 24), center_crop(open_image(pictures / name), 24)), name


@pytest.mark.parametrize(("format", "mean", "most"), [("jpeg", 3.5, 24), ("webp", 6.0, 48)])
def test_lossy_formats_stay_within_grey_levels_of_it(call, pictures, tmp_path, format, mean, most):
    """At quality 95, of 255: in the mean and at most. The chroma of JPEG is whole, that of WebP cannot be."""
    assert call("prepare", pictures, tmp_path / "out", "--resolution", 32, "--format", format) == 0
    for name, data in by_name(tmp_path / "out").items():
        error = np.abs(pixels(data).astype(int) - as_pillow_would(pictures / name, 32))
        assert error.mean() < mean, name
        assert error.max() <= most, name
        if format == "jpeg":
            assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(data))) == 0


def test_transparency_and_rotation_are_taken_as_training_takes_them(call, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    alpha = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(alpha).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(alpha[..., :3]).save(folder / "turned.png", exif=exif)
    Image.fromarray(alpha[..., 0]).save(folder / "grey.png")
    call("prepare", folder, tmp_path / "out", "--format", "png")
    for name, data in zip(("alpha", "grey", "turned"), members(tmp_path / "out").values(), strict=True):
        assert torch.equal(open_image(data), open_image(folder / f"{name}.png")), name


def test_keep_leaves_the_bytes_of_what_needs_no_resizing(call, pictures, tmp_path):
    call("prepare", pictures, tmp_path / "out", "--resolution", 34, "--keep")
    for name, data in by_name(tmp_path / "out").items():
        is_kept = data == (pictures / name).read_bytes()
        assert is_kept == (min(SIZES[name]) <= 34), name
    assert read_json(tmp_path / "out" / "index.json")["counts"] == {"made smaller": 4, "kept as they are": 4}
    suffixes = {name: Path(member).suffix for name, member in zip(NAMES, members(tmp_path / "out"), strict=True)}
    assert (suffixes["d.png"], suffixes["b.jpg"], suffixes["c.png"]) == (".png", ".jpg", ".jpg")


def test_what_is_left_out_is_listed_with_its_reason(call, capsys, pictures, tmp_path):
    (pictures / "cut.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:500])
    (pictures / "text.png").write_text("no image")
    options = ("--min-side", 20, "--max-aspect", 4, "--shard-images", 3)
    assert call("prepare", pictures, tmp_path / "out", *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["number"], row["name"], row["why"]) for row in rows] == [
        (3, "cut.jpg", "unreadable"),
        (4, "d.png", "too small"),
        (7, "f.png", "too long"),
        (9, "text.png", "unreadable"),
    ]
    assert rows[1]["message"] == "18x20 pixels, below --min-side 20"
    assert rows[2]["message"] == "90x20 pixels, more than --max-aspect 4 times its shorter side"
    assert "no image in a format that is read" in rows[3]["message"]
    printed = capsys.readouterr().out
    assert "6 of 10 images in 4 shards" in printed
    assert all(f"{count}  skipped: {why}" in printed for count, why in ((2, "unreadable"), (1, "too small")))


def test_members_have_names_that_cannot_meet_and_no_second_dot(call, pictures, tmp_path):
    call("prepare", pictures, tmp_path / "out")
    names = list(members(tmp_path / "out"))
    assert names[:2] == ["00000000_a.jpg", "00000001_b.jpg"]
    assert names[4:6] == ["00000004_a.jpg", "00000005_e_b.jpg"]
    assert all(name.count(".") == 1 for name in names)


@pytest.mark.parametrize("ranks", ["RANK/WORLD_SIZE", "SLURM_PROCID/SLURM_NTASKS"])
def test_two_processes_make_the_bytes_of_one(call, capsys, monkeypatch, pictures, tmp_path, ranks):
    options = ("--resolution", 32, "--min-side", 20, "--shard-images", 2)
    assert call("prepare", pictures, tmp_path / "one", *options, "--workers", 1) == 0
    assert call("prepare", pictures, tmp_path / "workers", *options, "--workers", 3) == 0
    capsys.readouterr()
    rank, world = ranks.split("/")
    monkeypatch.setenv(world, "2")
    for number, said in ((1, "process 1 of 2"), (0, "7 of 8 images in 4 shards")):
        monkeypatch.setenv(rank, str(number))
        assert call("prepare", pictures, tmp_path / "two", *options) == 0
        assert said in capsys.readouterr().out
    assert contents(tmp_path / "two") == contents(tmp_path / "one") == contents(tmp_path / "workers")


def test_the_shards_train_by_the_line_that_is_printed(call, capsys, tiny_run, pictures, tmp_path):
    folder = tmp_path / "it's here"
    assert call("prepare", pictures, folder, "--resolution", 32, "--min-side", 32, "--shard-images", 1) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("vae train"))
    data = replace(compose(*shlex.split(line)[2:], "data.resolution=32").data, batch_size=2, workers=0)
    assert (data.source, data.root) == ("webdataset", str(folder / "{000000..000007}.tar"))
    assert [len(source) for source in open_sources(data)] == [4, 1]
    run = train(replace(without_adversary(tiny_run), data=data, updates=2, validate_every=2))
    assert (run / "checkpoints" / "step_0000002.ckpt").is_file()
    assert not (run / "skipped.jsonl").exists()


def test_lists_shards_and_data_sets_are_sources_too(call, pictures, tmp_path):
    (pictures / "list.txt").write_text("\n".join(NAMES))
    call("prepare", pictures, tmp_path / "folder", "--keep", "--shard-images", 3)
    call("prepare", pictures / "list.txt", tmp_path / "list", "--keep", "--shard-images", 3)
    for name, again in (("folder", "again"), ("folder/{000000..000002}.tar", "pattern")):
        call("prepare", tmp_path / name, tmp_path / again, "--keep")
    call("prepare", pictures, tmp_path / "hub", "--source", "huggingface", "--keep")
    made = {name: list(members(tmp_path / name).values()) for name in ("folder", "list", "again", "pattern", "hub")}
    assert len(made["folder"]) == len(NAMES)
    assert made["list"] == made["again"] == made["pattern"] == made["folder"]
    assert sorted(made["hub"]) == sorted(made["folder"])
