"""`vae interpolate`, `vary`, `restore`, `channels`, `prior`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae.data.contact_sheet import GAP
from vae.data.sources import VALIDATION_PHOTOS, Photos
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder

SMALL = ("--resolution", 32)
CELL = 128 + GAP  # of 32 pixels, enlarged
COMMANDS = ("interpolate", "vary", "restore", "channels", "prior")


@pytest.fixture
def two() -> list[Path]:
    """Embedded photographs, colour and grey."""
    photos = Photos(VALIDATION_PHOTOS)
    return [photos.root / name for name in ("astronaut.png", "camera.png")]


def _columns(path: Path) -> int:
    with Image.open(path) as sheet:
        assert (sheet.width - GAP) % CELL == 0
        return sheet.width // CELL


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(call, capsys, command):
    assert call(command, "--help") == 0
    assert f"Example: vae {command}" in capsys.readouterr().out


@pytest.mark.parametrize("spherical", [(), ("--spherical",)])
def test_interpolate_writes_a_sheet_with_both_ends_and_the_frames(call, capsys, model, two, tmp_path, spherical):
    given = ("--steps", 5, "--frames", "--output", tmp_path / "out", *SMALL, *spherical)
    assert call("interpolate", model, *two, two[0].parent / "coins.png", *given) == 0
    assert _columns(tmp_path / "out" / "sheet.png") == 5
    frames = tmp_path / "out" / "astronaut_png to camera_png"
    assert [path.name for path in sorted(frames.iterdir())] == [f"000{number}.png" for number in range(5)]
    assert "2 pairs in" in capsys.readouterr().out


def test_vary_says_how_wide_posteriors_are_and_why_samples_look_alike(call, capsys, tiny, two, tmp_path):
    narrow = AutoencoderKL(tiny)
    with torch.no_grad():
        narrow.quant_conv.bias[3:] = -20.0  # pyright: ignore[reportIndexIssue]
    model = save_autoencoder(narrow, tmp_path / "narrow")
    assert call("vary", model, *two, "--count", 9, "--output", tmp_path / "out", *SMALL) == 0
    printed = capsys.readouterr().out
    assert "posterior std" in printed
    assert "no difference is seen above 45 dB" in printed
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["astronaut_png.png", "camera_png.png"]
    assert _columns(tmp_path / "out" / "camera_png.png") == 8  # and the ninth in a row of its own
    assert call("vary", model, *two, "--spread", 3000, "--output", tmp_path / "out", *SMALL) == 0
    assert "no difference" not in capsys.readouterr().out


def test_pictures_are_a_function_of_the_seed(call, model, two, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        for command, *given in (("vary", "--spread", 20), ("restore", "--noise", 0.2)):
            call(command, model, two[0], *given, "--seed", seed, "--output", tmp_path / name / command, *SMALL)
    for command in ("vary", "restore"):
        one, again, other = (
            (tmp_path / name / command / "astronaut_png.png").read_bytes() for name in ("one", "again", "two")
        )
        assert one == again
        assert one != other


def test_restore_measures_every_level_and_says_when_nothing_is_restored(call, capsys, model, two, tmp_path):
    given = ("--noise", 0.1, "--noise", 0.2, "--mask", 0.25, "--output", tmp_path / "out", *SMALL)
    assert call("restore", model, *two, *given) == 0
    printed = capsys.readouterr().out
    assert all(f" {label} " in printed for label in ("none", "noise 0.1", "noise 0.2", "mask 0.25"))
    assert "noise 0.1, noise 0.2, mask 0.25: nothing is restored" in printed
    assert _columns(tmp_path / "out" / "camera_png.png") == 3


def test_channels_are_shown_eight_to_a_row_and_each_is_in_the_table(call, capsys, tiny, two, tmp_path):
    model = save_autoencoder(AutoencoderKL(replace(tiny, latent_channels=17)), tmp_path / "many")
    assert call("channels", model, *two, "--output", tmp_path / "out", *SMALL) == 0
    assert _columns(tmp_path / "out" / "astronaut_png.png") == 8
    assert " 16 " in capsys.readouterr().out


def test_prior_shows_models_of_different_latents_side_by_side(call, capsys, tiny, model, two, tmp_path):
    other = save_autoencoder(AutoencoderKL(replace(tiny, latent_channels=5)), tmp_path / "other")
    images = [part for path in two for part in ("--images", path)]
    assert call("prior", model, other, *images, "--count", 4, "--output", tmp_path / "out", *SMALL) == 0
    sheets = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert sheets == ["fitted.png", "midpoints.png", "positions.png", "posterior.png", "standard.png"]
    assert _columns(tmp_path / "out" / "standard.png") == 4
    assert _columns(tmp_path / "out" / "midpoints.png") == 1
    printed = capsys.readouterr().out
    assert "3x16x16" in printed
    assert "5x16x16" in printed


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_channels_are_shown_too(call, tiny, tmp_path, channels):
    model = save_autoencoder(AutoencoderKL(replace(tiny, in_channels=channels, out_channels=channels)), tmp_path / "m")
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path in files:
        np.save(path, np.random.default_rng(0).integers(0, 255, (32, 32, channels), dtype=np.uint8))
    images = [part for path in files for part in ("--images", path)]
    for command, *given in (
        ("interpolate", *files, "--frames", "--steps", 2),
        ("vary", *files, "--count", 1),
        ("restore", *files, "--mask", 0.1),
        ("channels", *files),
        ("prior", *images, "--count", 2),
    ):
        assert call(command, model, *given, *SMALL, "--output", tmp_path / command) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interpolate", "MODEL", "ONE"), "1 image, expected two or more to go between"),
        (("interpolate", "MODEL", "ONE", "TWO", "--resolution", 33), "33x33 pixels, expected multiples of 2"),
        (("vary", "MODEL", "/nowhere.png"), "/nowhere.png: No such file or directory"),
        (("restore", "MODEL", "ONE"), "neither --noise nor --mask, expected one of them at least, as --noise 0.1"),
        (("restore", "MODEL", "ONE", "--noise", 0), "expected more than 0"),
        (("restore", "MODEL", "ONE", "--mask", 2, *SMALL), "share=2.0, expected 0 to 1"),
        (("channels", "MODEL", "ONE", "--device", "abacus"), "device='abacus' is not to be had"),
        (("prior", "MODEL", "MODEL", "--images", "ONE", "--images", "TWO"), "the same MODEL twice; name each once"),
        (("prior", "MODEL", "--images", "ONE"), "--images with 1 image, expected two or more"),
    ],
)
def test_refused_input_is_one_line_and_status_two(call, capsys, model, two, tmp_path, arguments, message):
    names = {"MODEL": model, "ONE": two[0], "TWO": two[1]}
    given = [names.get(argument, argument) for argument in arguments]
    assert call(*given, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_one_readable_image_of_two_is_not_enough_to_go_between(call, capsys, model, two, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert call("interpolate", model, two[0], tmp_path / "broken.png", "--output", tmp_path / "out", *SMALL) == 2
    assert "one image that can be read, expected two or more" in capsys.readouterr().err
