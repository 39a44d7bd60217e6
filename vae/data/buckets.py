"""Batches of one shape each, from images of any shape: aspect-ratio buckets at one or several resolutions.

A bucket is a shape (height, width) of about `resolution` squared pixels. Each image goes to the bucket of each
resolution that costs it least of its area, if that is little enough and nothing is enlarged.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import xxhash

from vae.data.order import Order, Pick, permutation, seed_for

MAX_ASPECT = 3.0
PHASES, GROUPS, MEMBERS = 4, 5, 6  # what a seed is for
NOWHERE = -1


def bucket_shapes(resolution: int, loss: float, multiple: int) -> list[tuple[int, int]]:
    """Shapes from 1:3 to 3:1, sides multiples of `multiple`, so near to each other that a crop costs `loss` at most.

    Few of them: from the square outwards, each as far from the last as `loss` and the multiples allow.
    """
    side = max(1, round(resolution / multiple)) * multiple
    tall = sorted(_near_the_area(side, multiple), key=_aspect)
    shapes = [(side, side)]
    while (covered := _aspect(shapes[-1]) / (1.0 - loss)) < MAX_ASPECT:
        further = [shape for shape in tall if _aspect(shape) > _aspect(shapes[-1])]
        if not further:
            break
        within = [shape for shape in further if _aspect(shape) * (1.0 - loss) <= covered]
        shapes.append(within[-1] if within else further[0])
    return sorted({*shapes, *((width, height) for height, width in shapes)})


def _near_the_area(side: int, multiple: int) -> list[tuple[int, int]]:
    """Shapes higher than wide whose area is that of the square, by a tenth more or less."""
    sides = range(multiple, round(side * MAX_ASPECT), multiple)
    area = side * side
    return [(height, width) for height in sides for width in sides if width < height and _near(height * width, area)]


def _near(area: int, wanted: int) -> bool:
    return abs(area / wanted - 1.0) <= 0.1


def _aspect(shape: tuple[int, int]) -> float:
    return shape[0] / shape[1]


def lost_area(sizes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The share of each image (N, 2: height, width) that the largest crop of a shape's aspect leaves out."""
    ratio = (sizes[:, 0] * shape[1]) / np.maximum(sizes[:, 1] * shape[0], 1)
    return 1.0 - np.minimum(ratio, 1.0 / np.maximum(ratio, 1e-9))


class BucketOrder(Order):
    """Groups of `group` images (of one update, over all processes) share a bucket; groups come in any order.

    Each bucket shows all its images, permuted, before any of them again, and gets groups in proportion to how many
    images it has: an image that fits several resolutions counts for a part in each. `sizes` is (N, 2): height and
    width, 0 where unknown. An epoch is as many groups as there are images for, on average.
    """

    def __init__(
        self, sizes: np.ndarray, shapes: Sequence[Sequence[tuple[int, int]]], loss: float, group: int, seed: int
    ) -> None:
        super().__init__(seed, (0, 0))
        self.sizes, self.group = sizes, group
        self.shapes = [shape for of_resolution in shapes for shape in of_resolution]
        table = _assign(sizes, shapes, loss)
        parts = (table != NOWHERE).sum(axis=1)
        self.placed = np.flatnonzero(parts)
        self.members = [np.flatnonzero((table == shape).any(axis=1)) for shape in range(len(self.shapes))]
        shares = [float((1.0 / parts[members]).sum()) for members in self.members]
        self._groups = np.array(shares) / group  # of each bucket in an epoch
        self._phases = np.random.default_rng(seed_for(seed, PHASES)).random(len(self.shapes))
        self._epoch, self._plan = -1, np.empty((0, 2), np.int64)
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}

    def fingerprint(self) -> str:
        return xxhash.xxh3_128(self.sizes.astype(np.int64).tobytes()).hexdigest()

    def pick(self, position: int) -> Pick:
        bucket, turn = self._at(position // self.group)
        place = turn * self.group + position % self.group  # in the bucket's own order, which has no end
        members = self.members[bucket]
        number = self._permuted(bucket, place // len(members))[place % len(members)]
        return Pick(position, int(number), self.shapes[bucket])

    def index_at(self, position: int) -> int:
        return self.pick(position).number

    def alike(self, pick: Pick) -> Sequence[int]:
        return cast(Sequence[int], self.members[self.shapes.index(pick.size)])

    def fitting(self, pick: Pick) -> Sequence[int]:
        """All that are large enough, at whatever loss of area."""
        return cast(Sequence[int], np.flatnonzero((self.sizes >= pick.size).all(axis=1)))

    def _at(self, group: int) -> tuple[int, int]:
        """(bucket of a group, the how-manieth it is of that bucket)"""
        epoch = max(0, self._epoch)
        while epoch and self._before(epoch).sum() > group:
            epoch -= 1
        while self._before(epoch + 1).sum() <= group:
            epoch += 1
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._planned(epoch)
        bucket, turn = self._plan[group - self._before(epoch).sum()]
        return int(bucket), int(turn)

    def _before(self, epoch: int) -> np.ndarray:
        """How many groups each bucket has had before an epoch."""
        return np.floor(epoch * self._groups + self._phases).astype(np.int64)

    def _planned(self, epoch: int) -> np.ndarray:
        """The groups of an epoch in their order, (groups, 2): bucket, the how-manieth of it."""
        turns = self._before(epoch)
        buckets = np.repeat(np.arange(len(turns)), self._before(epoch + 1) - turns)
        buckets = buckets[permutation(len(buckets), self.seed, epoch, GROUPS).numpy()]
        plan = np.empty((len(buckets), 2), np.int64)
        for row, bucket in enumerate(buckets):
            plan[row] = bucket, turns[bucket]
            turns[bucket] += 1
        return plan

    def _permuted(self, bucket: int, turn: int) -> np.ndarray:
        """The bucket's images as they are shown for the how-manieth time."""
        if self._rounds.get(bucket, (-1,))[0] != turn:
            members = self.members[bucket]
            order = permutation(len(members), self.seed, turn, bucket, MEMBERS).numpy()
            self._rounds[bucket] = turn, members[order]
        return self._rounds[bucket][1]


def _assign(sizes: np.ndarray, shapes: Sequence[Sequence[tuple[int, int]]], loss: float) -> np.ndarray:
    """(N, resolutions): the number of the best bucket at each, NOWHERE where it would enlarge or cost too much."""
    table = np.full((len(sizes), len(shapes)), NOWHERE, np.int64)
    first = 0
    for column, of_resolution in enumerate(shapes):
        costs = np.stack([lost_area(sizes, shape) for shape in of_resolution], axis=1)
        for number, (height, width) in enumerate(of_resolution):
            costs[(sizes[:, 0] < height) | (sizes[:, 1] < width), number] = np.inf
        best = np.argmin(costs, axis=1)
        fits = costs[np.arange(len(sizes)), best] <= loss
        table[fits, column] = first + best[fits]
        first += len(of_resolution)
    return table
