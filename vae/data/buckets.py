"""Batches of one shape each, from images of any shape: aspect-ratio buckets at one or several resolutions.

A bucket is a shape (height, width) of about `resolution` squared pixels. Each image goes to the bucket of each
resolution that costs it least of its area, if that is little enough and nothing is enlarged.
"""

import math
from collections.abc import Sequence

import numpy as np

from vae.data.order import Order, Pick, permutation, seed_for

MAX_ASPECT = 3.0
RESOLUTION = 4  # what a seed is for
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

    An epoch shows every image that has a bucket, at a resolution drawn among those it is large enough for. What a
    bucket lacks of its last group is filled with images of that bucket that were already shown. `sizes` is (N, 2):
    height and width, 0 where unknown.
    """

    def __init__(
        self, sizes: np.ndarray, shapes: Sequence[Sequence[tuple[int, int]]], loss: float, group: int, seed: int
    ) -> None:
        super().__init__(seed, (0, 0))
        self.shapes = [shape for of_resolution in shapes for shape in of_resolution]
        self.group = group
        self._table = _assign(sizes, shapes, loss)
        self.placed = np.flatnonzero((self._table != NOWHERE).any(axis=1))
        self._epoch, self._start, self._plan = -1, 0, np.empty((0, 2), np.int64)

    def pick(self, position: int) -> Pick:
        index, shape = self._at(position)
        return Pick(position, index, self.shapes[shape])

    def index_at(self, position: int) -> int:
        return self._at(position)[0]

    def alike(self, pick: Pick) -> Sequence[int]:
        shape = self.shapes.index(pick.size)
        return np.flatnonzero((self._table == shape).any(axis=1)).tolist()

    def epoch_length(self, epoch: int) -> int:
        return len(self._planned(epoch))

    def _at(self, position: int) -> tuple[int, int]:
        if position < self._start:
            self._epoch, self._start, self._plan = -1, 0, np.empty((0, 2), np.int64)
        while position >= self._start + len(self._plan):
            self._start += len(self._plan)
            self._epoch += 1
            self._plan = self._planned(self._epoch)
        index, shape = self._plan[position - self._start]
        return int(index), int(shape)

    def _planned(self, epoch: int) -> np.ndarray:
        """(images of the epoch and what fills the groups, 2): index and bucket, in order."""
        shape_of = self._drawn(epoch)
        order = self.placed[permutation(len(self.placed), self.seed, epoch).numpy()]
        groups = []
        for shape in np.unique(shape_of[order]):
            members = order[shape_of[order] == shape]
            full = math.ceil(len(members) / self.group) * self.group
            groups += list(np.resize(members, full).reshape(-1, self.group))
        chosen = [groups[turn] for turn in permutation(len(groups), self.seed, epoch, RESOLUTION).tolist()]
        indices = np.concatenate(chosen)
        return np.stack([indices, shape_of[indices]], axis=1)

    def _drawn(self, epoch: int) -> np.ndarray:
        """The bucket of every image in an epoch, NOWHERE where it has none."""
        draws = np.random.default_rng(seed_for(self.seed, epoch, RESOLUTION)).random(len(self._table))
        fitting = self._table != NOWHERE
        wanted = np.floor(draws * fitting.sum(axis=1)).astype(np.int64)  # the how-manieth of those that fit
        column = np.argmax(np.cumsum(fitting, axis=1) > wanted[:, None], axis=1)
        return self._table[np.arange(len(self._table)), column]


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
