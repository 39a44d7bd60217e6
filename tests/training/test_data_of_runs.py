"""Whole runs on data as they are: of forty sizes, partly corrupt, grey, with alpha, of many channels, of 16 bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import read_json
from tests.training.harness import small_run
from tests.training.images import noise, on, save, with_corrupt_ones
from tests.training.test_processes import of_processes, outcome, run
from vae.config.data import bucket_shapes
from vae.data.decode import image_size
from vae.data.sampler import lost_area
from vae.data.sources import Source
from vae.errors import InputError
from vae.training.train import train


@pytest.fixture
def of_forty_sizes(tmp_path: Path) -> Path:
    aspects = np.exp(np.linspace(-0.9, 0.9, 40))
    for number, aspect in enumerate(aspects):
        height, width = round((60 + number) * aspect**0.5), round((60 + number) / aspect**0.5)
        save(tmp_path / "images" / "train", f"{number}.png", noise(height, width, number))
    save(tmp_path / "images" / "val", "a.png", noise(40, 50, 100))
    save(tmp_path / "images" / "val", "b.png", noise(50, 40, 101))
    return tmp_path / "images"


def test_forty_sizes_train_on_two_processes_in_batches_of_one_shape_each(tmp_path, of_forty_sizes):
    buckets = {"bucket_resolutions": [32, 48], "bucket_loss": 0.15}
    config = replace(on(small_run(tmp_path), of_forty_sizes, **buckets), updates=24, validate_every=12, name="run")
    folder = run(of_processes(config, 2))
    ranks = [outcome(folder, rank) for rank in range(2)]
    assert ranks[0]["sha256"] == ranks[1]["sha256"]
    assert ranks[0]["shapes"] == ranks[1]["shapes"]
    allowed = {shape for side in (32, 48) for shape in bucket_shapes(side, 0.15, 2)}
    seen = {(height, width) for _, _, height, width in ranks[0]["shapes"]}
    assert seen <= allowed
    assert len(seen) > 8
    for rank in ranks:
        for number, (_, _, height, width) in enumerate(rank["shapes"]):
            for name in rank["names"][2 * number : 2 * number + 2]:
                size = np.array(image_size(of_forty_sizes / "train" / name))[None]
                assert lost_area(size, (height, width))[0] <= 0.15
    print(f"{len(seen)} shapes in {len(ranks[0]['shapes'])} batches of two processes")


def test_compiling_and_buckets_are_refused_together(of_forty_sizes, tmp_path):
    with pytest.raises(InputError, match=r"compile=true with data\.bucket_resolutions"):
        replace(on(small_run(tmp_path), of_forty_sizes, bucket_resolutions=[32]), compile=True)


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (4, 8), (6, 8), (3, 16), (1, 16)])
def test_images_of_other_channels_and_depths_train_and_are_pictured(tmp_path, channels, bits):
    depth = {8: np.uint8, 16: np.uint16}[bits]
    for side, count in (("train", 8), ("val", 2)):
        (tmp_path / "images" / side).mkdir(parents=True)
        for number in range(count):
            high = 256 if bits == 8 else 65536
            values = np.random.default_rng(number).integers(0, high, (40, 48, channels)).astype(depth)
            np.save(tmp_path / "images" / side / f"{number}.npy", values)
    config = on(small_run(tmp_path / "runs"), tmp_path / "images", bits=bits, colour=0.1 if channels in (1, 3) else 0.0)
    model = replace(config.model, in_channels=channels, out_channels=channels)
    weights = replace(config.loss.weights, perceptual=0.5)
    loss = replace(config.loss, weights=weights, perceptual_net="alex", augment=[])
    folder = train(replace(config, model=model, loss=loss, updates=6))
    assert read_json(folder / "config.json")["data"]["bits"] == bits
    with Image.open(next((folder / "reconstructions").glob("*6.png"))) as picture:
        assert picture.mode == "RGB"


class Drawn(Source):
    """Six lines of one's own: grey ramps, made when they are asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def read(self, index: int) -> Tensor:
        return (torch.arange(48 * 40).view(1, 40, 48) * (index + 1) % 256).to(torch.uint8)


def test_a_source_of_ones_own_trains_and_resumes_by_its_names(tmp_path):
    config = replace(small_run(tmp_path), updates=6)
    sources = Drawn([f"{number}" for number in range(9)]), Drawn(["a", "b"])
    folder = train(config, sources)
    assert train(replace(config, updates=9), sources) == folder
    with pytest.raises(InputError, match="added, removed, renamed or changed"):
        train(replace(config, updates=12), (Drawn(["x", *sources[0].names]), sources[1]))


def test_training_and_validation_on_the_same_images_is_refused(tmp_path):
    with_corrupt_ones(tmp_path / "images", 20, 0)
    root = tmp_path / "images" / "train"
    with pytest.raises(InputError, match="training and validation, expected different images"):
        train(on(small_run(tmp_path / "runs"), root, validation_root=str(root)))


def test_images_of_other_sizes_are_noticed_when_a_run_in_buckets_goes_on(tmp_path, of_forty_sizes):
    config = on(small_run(tmp_path / "runs"), of_forty_sizes, bucket_resolutions=[32], bucket_loss=0.15)
    train(replace(config, updates=3))
    save(of_forty_sizes / "train", "7.png", noise(99, 41, 5))
    with pytest.raises(InputError, match="added, removed, renamed or changed"):
        train(replace(config, updates=6))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([1, 2], "Drawn.names has 1, expected strings"),
        (["a", "a"], "twice"),
        ("abc", "sequence"),
        ([], "one name or more"),
    ],
)
def test_a_source_without_distinct_names_is_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        train(small_run(tmp_path), (Drawn(names), Drawn(["a"])))
    assert not (tmp_path / "run").exists()
