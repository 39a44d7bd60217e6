"""Batches of one shape each: which shapes there are, who goes where, and in what order."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from vae.config.data import MAX_ASPECT, bucket_shapes
from vae.data.sampler import NEAR, BucketOrder, EndlessSampler, lost_area

GROUP = 6


@pytest.fixture
def sizes() -> np.ndarray:
    """Heights and widths of 300 photographs of any shape up to 2.9 : 1."""
    generator = np.random.default_rng(0)
    aspects = np.exp(generator.uniform(-1.06, 1.06, 300))
    areas = generator.uniform(200.0, 900.0, 300)
    return np.stack([areas * aspects**0.5, areas / aspects**0.5], axis=1).astype(np.int64)


def _order(sizes: np.ndarray, resolutions: tuple[int, ...] = (128,), loss: float = 0.1) -> BucketOrder:
    return BucketOrder(sizes, [bucket_shapes(side, loss, 8) for side in resolutions], loss, GROUP, seed=1)


@pytest.mark.parametrize("resolution", [128, 256, 512, 1024])
@pytest.mark.parametrize("loss", [0.05, 0.1, 0.2])
def test_every_image_up_to_three_to_one_has_a_bucket_that_costs_no_more_than_stated(resolution, loss):
    aspects = np.exp(np.linspace(-np.log(MAX_ASPECT), np.log(MAX_ASPECT), 2001)) * 0.999
    images = np.stack([10_000 * aspects, np.full_like(aspects, 10_000)], axis=1)
    shapes = bucket_shapes(resolution, loss, 8)
    cheapest = np.min([lost_area(images, shape) for shape in shapes], axis=0)
    print(f"{resolution} px, {loss}: {len(shapes)} shapes, at most {cheapest[10:-10].max():.3f} of the area")
    assert cheapest[10:-10].max() <= loss
    assert all(side % 8 == 0 for shape in shapes for side in shape)
    assert all(0.75 < h * w / resolution**2 < 1.3 for h, w in shapes)


def test_every_bucket_shows_all_its_images_before_any_again_and_none_more_often(sizes):
    order = _order(sizes)
    picks = [order.pick(position) for position in range(GROUP * 500)]
    for shape, members in zip(order.shapes, order.members, strict=True):
        shown = [pick.number for pick in picks if pick.size == shape]
        for start in range(0, len(shown) - len(members), len(members)):
            assert set(shown[start : start + len(members)]) == set(members)
    seen = Counter(pick.number for pick in picks)
    expected = len(picks) / len(order.placed)
    assert all(abs(seen[number] - expected) <= 4 for number in order.placed.tolist())


def test_a_bucket_with_fewer_images_than_an_update_is_not_shown_more_often_than_others():
    sizes = np.array([[200, 200]] * 60 + [[200, 90]] * 2)
    order = BucketOrder(sizes, [bucket_shapes(64, 0.1, 8)], 0.1, group=16, seed=0)
    seen = Counter(order.index_at(position) for position in range(16 * 2000))
    assert max(seen.values()) / min(seen.values()) < 1.1


def test_every_group_has_one_shape_that_none_of_its_images_is_enlarged_for(sizes):
    picks = [_order(sizes).pick(position) for position in range(5 * 300)]
    order = _order(sizes)
    for start in range(0, len(picks), GROUP):
        group = picks[start : start + GROUP]
        assert len({pick.size for pick in group}) == 1
    for pick in picks:
        assert (sizes[pick.number] >= pick.size).all()
        assert lost_area(sizes[pick.number][None], pick.size)[0] <= 0.1
    assert picks == [order.pick(position) for position in range(5 * 300)]


def test_any_place_of_the_order_can_be_asked_for_first(sizes):
    whole = _order(sizes, (96, 128, 256))
    picks = [whole.pick(position) for position in range(1200)]
    for start in (0, 1, 299, 600, 1100):
        assert _order(sizes, (96, 128, 256)).pick(start) == picks[start]
    assert [whole.pick(position) for position in (1100, 3, 700)] == [picks[1100], picks[3], picks[700]]


def test_ranks_share_each_group_of_the_order(sizes):
    ranks = [list(islice(EndlessSampler(_order(sizes), rank=rank, world_size=2), 300)) for rank in range(2)]
    for start in range(0, 300, GROUP // 2):
        assert len({pick.size for rank in ranks for pick in rank[start : start + GROUP // 2]}) == 1
    whole = [_order(sizes).pick(position) for position in range(600)]
    assert sorted(pick for rank in ranks for pick in rank) == whole


def test_an_image_is_seen_at_every_resolution_that_it_is_large_enough_for(sizes):
    order = _order(sizes, (64, 128, 2048))
    large = int(np.argmax(sizes.min(axis=1)))
    picks = [order.pick(position) for position in range(300 * 40)]
    seen = {pick.size for pick in picks if pick.number == large}
    areas = sorted(round((h * w) ** 0.5 / 64) for h, w in seen)
    assert areas == [1, 2]


def test_what_is_too_small_too_long_or_unreadable_has_no_bucket():
    order = _order(np.array([[500, 400], [60, 400], [100, 100], [0, 0], [4000, 500]]))
    assert order.placed.tolist() == [0]


def test_another_image_in_the_place_of_one_has_the_same_shape(sizes):
    order = _order(sizes, (96, 128))
    for position in range(50):
        pick = order.pick(position)
        for attempt in range(40):
            other = order.replacement(pick, attempt)
            assert (other.position, other.size) == (pick.position, pick.size)
            assert (sizes[other.number] >= pick.size).all()
            assert attempt >= NEAR or lost_area(sizes[other.number][None], pick.size)[0] <= 0.1
    assert torch.initial_seed() == 0
