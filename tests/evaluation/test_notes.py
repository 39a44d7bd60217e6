"""What is said before an evaluation: images that the model was trained on, files that cannot be read, which export."""

from dataclasses import replace

import pytest
import torch
from torchvision.io import write_png

from tests.conftest import without_adversary
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.data.build import open_sources
from vae.data.sources import Source
from vae.evaluation.evaluate import evaluate
from vae.evaluation.setup import trained_on
from vae.run_dir import RunDir
from vae.training.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 60 images of noise, and two files whose names are of no kind that can be read; one is a PNG."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(60):
        pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        write_png(pixels, str(folder / f"{number:02d}.png"))
    (folder / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "b.heic").write_bytes((folder / "00.png").read_bytes())
    return folder


def trained(tiny_run, photos):
    data = replace(tiny_run.data, source="folder", root=str(photos))
    return train(without_adversary(replace(tiny_run, data=data, updates=2, validate_every=2)))


def test_a_run_of_few_images_holds_out_a_tenth_says_what_that_can_tell_and_counts_what_it_passes_over(
    tiny_run, photos, capsys
):
    """A folder of 60 images gave one, by which exports/best was chosen; HEIC was passed over without a word."""
    trained(tiny_run, photos)
    said = capsys.readouterr().out
    assert "54 training and 6 validation images of folder" in said
    assert "note: 6 validation images can show that a run learns, and not which of two exports is better" in said
    assert "2 pictures in " in said
    assert "are not used: 2 .heic; b.heic is a JPEG or PNG all the same: rename such files" in said


def test_an_evaluation_says_how_many_images_the_model_was_trained_on(tiny_run, photos, tmp_path, capsys):
    run = trained(tiny_run, photos)
    data = DataConfig(source="folder", root=str(photos), resolution=32, workers=0, validation_fraction=1.0)
    config = EvaluateConfig(model=str(run), data=data, metrics=["psnr"], output=str(tmp_path), probe_images=0)
    evaluate(config)
    assert f"note: 54 of these 60 images were trained on by {run}" in capsys.readouterr().out

    # The images that the run held out were not trained on.
    held_out = replace(data, validation_fraction=0.02)
    evaluate(replace(config, data=held_out, name="held-out"))
    assert "were trained on" not in capsys.readouterr().out

    # Nor were those of another folder. Part of the run's folder, and a list of its files, count.
    other = tmp_path / "other"
    other.mkdir()
    (other / "00.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "list.txt").write_text("00.png\n01.png\n02.png\n")
    counts = []
    for source, root in (("folder", other), ("list", photos / "list.txt")):
        named = replace(data, source=source, root=str(root))
        counts.append(trained_on(RunDir(run), named, open_sources(named)[1]))
    training = set(open_sources(replace(data, validation_fraction=0.02))[0].names)
    assert counts == [0, len({"00.png", "01.png", "02.png"} & training)]


class Noise(Source):
    """A source of somebody's own."""

    def __init__(self, name):
        self.names = [f"{name} {number}" for number in range(4)]

    def read(self, index):
        return torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def test_advice_to_a_run_of_own_sources_is_about_them(tiny_run, capsys):
    """D16: it ended with data=photos, and with data.validation_fraction, which changes nothing there."""
    sources = (Noise("training"), Noise("validation"))
    train(without_adversary(replace(tiny_run, updates=2)), sources)
    said = capsys.readouterr().out
    assert "4 training and 4 validation images of Noise" in said
    assert "data=photos" not in said
    assert "data.root=FOLDER_OF_HELD_OUT_IMAGES" in said
    assert "4 validation images can show that a run learns, and not which of two exports is better" in said
    assert "give more of them" in said
    assert "validation_fraction" not in said
