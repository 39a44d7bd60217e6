from dataclasses import replace
from itertools import islice

import pytest
import torch

from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.data.contact_sheet import to_picture
from vae.data.loader import TrainingImages, training_loader, validation_loader
from vae.data.sampler import EndlessSampler, Order, Shuffled, seed_for
from vae.data.sources import Names, split_by_hash
from vae.errors import InputError

PHOTOS = DataConfig(source="photos", resolution=32, batch_size=3, validation_batch_size=2, workers=0)


def _shuffled(length: int, seed: int) -> Order:
    return Shuffled(length, seed, (32, 32))


def test_every_epoch_shows_every_image_once_in_another_order():
    picks = list(islice(EndlessSampler(_shuffled(7, seed=0)), 21))
    epochs = [[pick.number for pick in picks[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_start_in_the_middle_continues_the_same_order():
    whole = list(islice(EndlessSampler(_shuffled(5, seed=3)), 30))
    for start in (0, 1, 4, 5, 13):
        assert list(islice(EndlessSampler(_shuffled(5, seed=3), start=start), 30 - start)) == whole[start:]


def test_ranks_share_the_order_of_one_process_without_overlap():
    whole = list(islice(EndlessSampler(_shuffled(5, seed=3)), 12))
    ranks = [list(islice(EndlessSampler(_shuffled(5, seed=3), rank=rank, world_size=3), 4)) for rank in range(3)]
    assert sorted(pick for rank in ranks for pick in rank) == whole


def test_seeds_differ_for_neighbouring_parts():
    assert len({seed_for(a, b) for a in range(30) for b in range(30)}) == 900


def _batches(workers: int, start: int = 0, count: int = 4) -> list[torch.Tensor]:
    config = replace(PHOTOS, workers=workers)
    training, _ = open_sources(config)
    order = _shuffled(len(training), 0)
    loader = training_loader(TrainingImages(training, order, config, 3, 0), EndlessSampler(order, start))
    return [batch.images for batch in islice(loader, count)]


def _equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_restart():
    whole = _batches(workers=0)
    assert _equal(whole, _batches(workers=2))
    assert _equal(whole[2:], _batches(workers=0, start=6, count=2))


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _batches(workers=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_shares_cover_every_image_exactly_once(world_size):
    _, validation = open_sources(PHOTOS)
    shares = [validation_loader(validation, PHOTOS, 3, rank, world_size) for rank in range(world_size)]
    positions = [position for loader in shares for batch in loader for position in batch.positions]
    assert sorted(positions) == list(range(len(validation)))


def test_training_and_validation_photographs_do_not_meet():
    training, validation = open_sources(PHOTOS)
    assert not set(training.names) & set(validation.names)
    assert "astronaut.png" in validation.names


def _split(names: list[str], fraction: float) -> tuple[set[str], set[str]]:
    training, validation = split_by_hash(Names(names), fraction)
    return {names[index] for index in training}, {names[index] for index in validation}


def test_the_split_of_a_folder_keeps_its_sides_when_images_are_added():
    names = [f"{number}.jpg" for number in range(500)]
    training, validation = _split(names, 0.1)
    assert 25 < len(validation) < 80
    grown, held_out = _split([*names, *(f"new/{number}.jpg" for number in range(500))], 0.1)
    assert training <= grown
    assert validation <= held_out


@pytest.mark.parametrize(("images", "held_out"), [(1, 1), (9, 1), (60, 6), (61, 7), (160, 16), (500, 16)])
def test_a_tenth_of_few_images_or_sixteen_are_held_out_whatever_the_fraction_gives(images, held_out):
    names = [f"{number}.jpg" for number in range(images)]
    training, validation = split_by_hash(Names(names), 1e-9, DataConfig.validation_at_least)
    assert (len(training), len(validation)) == (images - held_out, held_out)
    assert not set(training) & set(validation)


def test_images_that_are_added_bring_no_image_from_training_to_validation():
    names = [f"{number}.jpg" for number in range(160)]
    training: set[str] = set()
    for total in (160, 200, 500, 900, 3000):
        names += [f"new/{number}.jpg" for number in range(len(names), total)]
        indices, held_out = split_by_hash(Names(names), 0.02, 16)
        assert len(held_out) >= 16
        assert training <= {names[index] for index in indices}
        training = {names[index] for index in indices}


def test_a_small_folder_still_holds_one_image_out():
    training, validation = _split(["a.jpg", "b.jpg", "c.jpg"], 1e-9)
    assert (len(training), len(validation)) == (2, 1)


def test_a_folder_is_read_recursively_without_hidden_files(tmp_path):
    training, _ = open_sources(PHOTOS)
    for name in ("a.png", "deep/er/b.PNG", ".hidden.png", ".cache/c.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(training.open(0)).save(path, format="PNG")
    config = DataConfig(source="folder", root=str(tmp_path), validation_fraction=1.0)
    _, everything = open_sources(config)
    assert list(everything.names) == ["a.png", "deep/er/b.PNG"]


def test_a_second_folder_can_be_the_validation(tmp_path):
    training, _ = open_sources(PHOTOS)
    for side in ("train", "val"):
        (tmp_path / side).mkdir()
        to_picture(training.open(0)).save(tmp_path / side / f"{side}.png")
    config = DataConfig(root=str(tmp_path / "train"), validation_root=str(tmp_path / "val"))
    ours, theirs = open_sources(config)
    assert (list(ours.names), list(theirs.names)) == (["train.png"], ["val.png"])


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_missing_or_empty_folder_is_refused_by_key_and_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"data\.root='.*{name}'"):
        open_sources(DataConfig(root=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"source": "cloud"}, "data.source='cloud'"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"resolution": -8}, "data.resolution=-8"),
        ({"workers": -1}, "data.workers=-1"),
        ({"validation_fraction": 0.0}, "data.validation_fraction"),
        ({"validation_images": 0}, "data.validation_images=0"),
        ({"crop_scale": [0.9, 0.1]}, "data.crop_scale"),
        ({"root": None}, "data.root is not set"),
        ({"source": "photos"}, "data.root="),
        ({"split": "test"}, "data.split='test' with data.source='folder'"),
    ],
)
def test_impossible_data_configurations_are_refused_by_key(change, key):
    with pytest.raises(InputError, match=key):
        DataConfig(**({"root": "somewhere"} | change))
