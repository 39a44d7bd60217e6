"""The same images in every form that they can come in, and what a source's fingerprint tells of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader

from tests.data.forms import FORMS, IMAGES, PARTS, SIDE, Given, arrow, folder, image_folder, png, tars
from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.data.decode import open_image
from vae.data.loader import Batch, TrainingImages, training_loader, validation_loader
from vae.data.sampler import EndlessSampler, order_of
from vae.data.sources import Source

MOVED = ("folder", "txt", "imagefolder", "parquet", "tars")
AWKWARD = ["a b.png", "two\nlines.png", "\udcff.png", "\u00e9.png", "e\u0301.png", "\U0001f600.png", "\ufffd.png"]
AWKWARD += ["x" * 251 + ".png", "quo'te\".png", "-rf.png", "~.png", "{a,b}*.png", "Z.png", "a.PNG"]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "huggingface"))


def _config(tmp_path: Path, given: Given) -> DataConfig:
    whole = {"resolution": SIDE, "crop_scale": [1.0, 1.0], "flip": False}
    return DataConfig(**given, **whole, cache=str(tmp_path / "cache"), workers=0, batch_size=4, validation_batch_size=2)


def _digest(images: Tensor) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(image.numpy().tobytes()) for image in images]


def _expected(*parts: str) -> list[str]:
    return sorted(_digest(open_image(png(number))[None])[0] for part in parts for number in PARTS[part])


def _training(source: Source, config: DataConfig) -> DataLoader[Batch]:
    order = order_of(source, config, 0, 4, 1, lambda sizes, _: sizes)
    return training_loader(TrainingImages(source, order, config, 3, 0), EndlessSampler(order))


def _shown(batches: list[Batch]) -> list[str]:
    assert not any(batch.skipped for batch in batches)
    return sorted(digest for batch in batches for digest in _digest(batch.images))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels_in_an_epoch_and_in_validation(form, tmp_path, capsys):
    config = _config(tmp_path, FORMS[form](tmp_path / "images"))
    training, validation = open_sources(config)
    for _ in range(2):  # the second finds what the first has kept
        assert _shown(list(islice(_training(training, config), IMAGES // 4))) == _expected("train")
    assert _shown(list(validation_loader(validation, config, 3, 0, 1))) == _expected("val")
    names = [*training.names, *validation.names]
    assert len(set(names)) == len(names)
    assert "warning" not in capsys.readouterr().err
    again = open_sources(config)
    assert [source.fingerprint() for source in again] == [training.fingerprint(), validation.fingerprint()]


@pytest.mark.parametrize("form", ["folder", "arrow", "tars"])
def test_what_has_no_validation_of_its_own_is_divided(form, tmp_path):
    given = {"folder": folder, "arrow": arrow, "tars": tars}[form](tmp_path / "images")
    given |= {"folder": {"root": str(tmp_path / "images" / "train")}, "tars": {"validation_root": None}}.get(form, {})
    config = _config(tmp_path, given)
    training, validation = open_sources(config)
    assert min(len(training), len(validation)) >= 1
    both = [_digest(source.open(index)[None])[0] for source in (training, validation) for index in range(len(source))]
    assert sorted(both) == _expected("train")


def test_a_validation_set_is_limited_to_the_same_images_wherever_they_lie(tmp_path):
    limited = replace(_config(tmp_path, folder(tmp_path / "images")), validation_images=2)
    names = list(open_sources(limited)[1].names)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert list(open_sources(replace(limited, root=str(tmp_path / "elsewhere")))[1].names) == names
    assert len(names) == 2


@pytest.mark.parametrize("form", [*MOVED, "divided tars"])
def test_a_fingerprint_survives_a_move_of_the_folder(form, tmp_path):
    if form == "divided tars":
        given = tars(tmp_path / "images", shards=6) | {"validation_root": None}
    else:
        given = FORMS[form](tmp_path / "images")
    before = _fingerprint(tmp_path, given)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert _fingerprint(tmp_path, _at(given, tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("form", [*MOVED[:3], "tars"])
def test_a_fingerprint_tells_of_images_added_removed_and_renamed(form, tmp_path):
    given, root = FORMS[form](tmp_path / "images"), tmp_path / "images"
    seen = [_fingerprint(tmp_path, given)]
    several = {"txt": root, "tars": root}.get(form, root / "train")
    first = sorted(several.glob("train*.t*" if form in {"txt", "tars"} else "*.png"))[0]
    if form == "txt":
        lines = first.read_text().split()
        changes = [[*lines, "val/new.png"], lines[:-1], ["./" + lines[0], *lines[1:]], lines[::-1]]
        for changed in changes:
            first.write_text("\n".join(changed))
            seen.append(_fingerprint(tmp_path, given))
    else:
        given |= {"root": given["root"].replace("{0..2}", "*")}
        added = first.with_stem("train-9")
        added.write_bytes(first.read_bytes())
        seen.append(_fingerprint(tmp_path, given))
        added.rename(first.with_stem("train-8"))
        seen.append(_fingerprint(tmp_path, given))
        first.unlink()
        seen.append(_fingerprint(tmp_path, given))
    assert len(set(seen)) == len(seen)


def test_names_of_any_kind_survive_in_an_order_that_no_locale_or_time_zone_changes(tmp_path):
    awkward, root = tmp_path / "awkward", tmp_path / "images"
    awkward.mkdir()
    for number, name in enumerate(AWKWARD):
        (awkward / name).write_bytes(png(number))
    hub = image_folder(root)
    everything = {"source": "folder", "root": str(awkward), "validation_fraction": 1.0}
    _, source = open_sources(_config(tmp_path, everything))
    assert sorted(map(os.fsencode, source.names)) == sorted(map(os.fsencode, AWKWARD))
    assert [_digest(source.open(index)[None]) for index, name in enumerate(source.names)] == [
        _digest(open_image(png(AWKWARD.index(name)))[None]) for name in source.names
    ]
    here = [_fingerprint(tmp_path, everything), _fingerprint(tmp_path, hub)]
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kathmandu"}
    settings |= {"HF_DATASETS_CACHE": str(tmp_path / "another"), "HF_HUB_OFFLINE": "1"}
    code = (
        "import json, sys; from vae.config.data import DataConfig; from vae.data.build import open_sources\n"
        "pairs = [open_sources(DataConfig(**given)) for given in json.loads(sys.argv[1])]\n"
        "print(json.dumps([' '.join(source.fingerprint() for source in pair) for pair in pairs]))"
    )
    command = [sys.executable, "-c", code, json.dumps([everything, hub])]
    there = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == here


def _fingerprint(tmp_path: Path, given: Given) -> str:
    return " ".join(source.fingerprint() for source in open_sources(_config(tmp_path, given)))


def _at(given: Given, folder: Path) -> Given:
    here = str(folder.parent / "images")
    return {key: value.replace(here, str(folder)) if isinstance(value, str) else value for key, value in given.items()}
