"""Shards in their order: every image once an epoch, the same for any workers, a part of the shards for each process."""

import io
import random
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.data.loader import Batch, TrainingImages, shut_down, training_loader
from vae.data.sampler import NEAR, EndlessSampler, Order, ShardedOrder, order_of
from vae.data.shards import add_member
from vae.data.sources import Source

LENGTHS = (3, 1, 4, 2, 5, 3)
UNEVEN = [LENGTHS, (7,), (1, 1, 1), (2, 0, 3), (100, 1, 1, 1), tuple(range(1, 30)), (3,) * 200]


def _order(lengths: tuple[int, ...], lanes: int, seed: int = 0) -> ShardedOrder:
    return ShardedOrder(lengths, seed, (8, 8), lanes)


def _numbers(order: Order, count: int, start: int = 0, rank: int = 0, ranks: int = 1) -> list[int]:
    return [pick.number for pick in islice(EndlessSampler(order, start, rank, ranks), count)]


def _shards_of(numbers: list[int], lengths: tuple[int, ...]) -> list[int]:
    """Which shards these are, each whole and before the next."""
    ends, shards = np.cumsum(lengths), []
    while numbers:
        shard = int(np.searchsorted(ends, numbers[0], side="right"))
        images, numbers = numbers[: lengths[shard]], numbers[lengths[shard] :]
        assert sorted(images) == list(range(ends[shard] - lengths[shard], ends[shard]))[: len(images)] or not numbers
        shards.append(shard)
    return shards


@pytest.mark.parametrize("lanes", [1, 2, 3, 16])
@pytest.mark.parametrize("lengths", UNEVEN, ids=lambda lengths: f"{len(lengths)} shards")
def test_each_epoch_of_the_lanes_shows_every_shard_whole_and_once(lengths, lanes):
    order, filled = _order(lengths, lanes), sum(length > 0 for length in lengths)
    lanes, epochs = min(lanes, filled), 4
    shown = [[] for _ in range(epochs)]
    for lane in range(lanes):
        share = len(range(lane, filled, lanes))
        steps = epochs * share * max(lengths) + max(lengths)
        shards = _shards_of([order.index_at(lane + lanes * step) for step in range(steps)], lengths)
        for epoch in range(epochs):
            shown[epoch] += shards[epoch * share : (epoch + 1) * share]
    expected = [shard for shard, length in enumerate(lengths) if length]
    assert [sorted(shards) for shards in shown] == [expected] * epochs
    assert filled < 4 or shown[0] != shown[1]


def test_equal_shards_are_shown_once_in_as_many_positions_as_there_are_images():
    order = _order((5,) * 12, lanes=4)
    for epoch in range(5):
        assert sorted(_numbers(order, 60, start=60 * epoch)) == list(range(60))


def test_no_image_is_favoured_over_many_epochs_of_uneven_shards():
    counts = np.bincount(_numbers(_order(LENGTHS, lanes=4), 18 * 1000), minlength=18)
    assert counts.min() > 0.93 * 1000
    assert counts.max() < 1.07 * 1000


@pytest.mark.parametrize("lengths", UNEVEN[:4], ids=str)
def test_a_start_anywhere_goes_on_in_the_same_order(lengths):
    whole, draw = _numbers(_order(lengths, 4), 600), random.Random(1)
    for start in (draw.randrange(500) for _ in range(20)):
        assert _numbers(_order(lengths, 4), 100, start) == whole[start : start + 100]
    order = _order(lengths, 4)
    assert [order.index_at(position) for position in (400, 7, 599, 0)] == [whole[at] for at in (400, 7, 599, 0)]


def test_an_image_that_cannot_be_used_is_replaced_from_its_own_shard_and_at_last_from_any():
    order, ends = _order(LENGTHS, 4), np.cumsum(LENGTHS)
    for position in range(40):
        pick = order.pick(position)
        near, far = (
            {order.replacement(pick, attempt).number for attempt in some} for some in (range(NEAR), range(NEAR, 99))
        )
        assert len({int(np.searchsorted(ends, number, side="right")) for number in {pick.number, *near}}) == 1
        assert len({int(np.searchsorted(ends, number, side="right")) for number in far}) > 1


@pytest.mark.parametrize("lanes", [2, 4, 6])
def test_two_processes_read_shards_of_their_own_that_together_are_the_epoch(lanes):
    lengths = (5,) * 12
    ranks = [_numbers(_order(lengths, lanes), 30, rank=rank, ranks=2) for rank in range(2)]
    shards = [{number // 5 for number in numbers} for numbers in ranks]
    assert not shards[0] & shards[1]
    assert sorted(ranks[0] + ranks[1]) == list(range(60))


@pytest.fixture
def shards(tmp_path: Path) -> DataConfig:
    """Tar shards of tiny images, the level of each its number."""
    number = 0
    for shard, length in enumerate(LENGTHS):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for _ in range(length):
                stream = io.BytesIO()
                Image.new("L", (8, 8), number).save(stream, "PNG")
                add_member(archive, f"{number}.png", stream.getvalue())
                number += 1
    pattern = str(tmp_path / "{0..5}.tar")
    return DataConfig(
        source="webdataset", root=pattern, validation_root=pattern, resolution=8, batch_size=3, open_shards=4, workers=0
    )


def _loader(source: Source, config: DataConfig, start: int) -> DataLoader[Batch]:
    order = order_of(source, config, 5, 3, 1, lambda sizes, _: sizes)
    assert isinstance(order, ShardedOrder)
    return training_loader(TrainingImages(source, order, config, 1, 5), EndlessSampler(order, start))


def _levels(source: Source, config: DataConfig, start: int, batches: int) -> list[int]:
    loader = _loader(source, config, start)
    try:
        found = list(islice(loader, batches))
    finally:
        shut_down(loader)
    assert [at for batch in found for at in batch.positions] == list(range(start, start + 3 * batches))
    return torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_batches_are_the_same_for_any_number_of_workers_from_any_start(shards):
    source, _ = open_sources(shards)
    whole = _levels(source, shards, 0, 40)
    assert whole == _numbers(_order(LENGTHS, 4, seed=5), 120)
    assert all(_levels(source, replace(shards, workers=workers), 0, 8) == whole[:24] for workers in (1, 2, 4))
    draw = random.Random(0)
    for workers in (0, 0, 0, 0, 2) * 4:
        start = draw.randrange(100)
        assert _levels(source, replace(shards, workers=workers), start, 3) == whole[start : start + 9]
