"""The order of training images as a function of (seed, position): stateless, the same for any workers and ranks.

`position` counts samples since update 0 over all ranks; every random choice about a sample is seeded by it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

INSTEAD, SHARDS, LANE = 1, 2, 3  # what a seed is for, besides the permutation of an epoch
NEAR = 20  # attempts among those alike


class Pick(NamedTuple):
    """Which image (its `number` in the source) stands at a position, cut to `size` (height, width)."""

    position: int
    number: int
    size: tuple[int, int]


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several non-negative integers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def permutation(length: int, *parts: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_for(*parts)))


class Order(ABC):
    """(seed, position) -> an image. Each epoch shows every image, in a new order."""

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        self.seed, self.size = seed, size

    def pick(self, position: int) -> Pick:
        return Pick(position, self.index_at(position), self.size)

    def instead(self, pick: Pick, attempt: int) -> Pick:
        """Another image for the same place, where the one at hand cannot be used: one alike, at last any that fits."""
        others = self.alike(pick) if attempt < NEAR else self.fitting(pick)
        return pick._replace(number=int(others[seed_for(self.seed, pick.position, attempt, INSTEAD) % len(others)]))

    @abstractmethod
    def index_at(self, position: int) -> int: ...

    def fingerprint(self) -> str:
        """Of what it depends on besides the seed and the number of images."""
        return ""

    @abstractmethod
    def alike(self, pick: Pick) -> Sequence[int]:
        """The images that stand in its place best, itself among them: of the same bucket, of the same shard."""

    @abstractmethod
    def fitting(self, pick: Pick) -> Sequence[int]:
        """All that could stand there."""


class Shuffled(Order):
    """Every image anywhere: each epoch is a permutation of all."""

    def __init__(self, length: int, seed: int, size: tuple[int, int]) -> None:
        super().__init__(seed, size)
        self.length = length
        self._epoch, self._order = -1, torch.empty(0)

    def index_at(self, position: int) -> int:
        if position // self.length != self._epoch:
            self._epoch = position // self.length
            self._order = permutation(self.length, self.seed, self._epoch)
        return int(self._order[position % self.length])

    def alike(self, pick: Pick) -> Sequence[int]:
        return range(self.length)

    def fitting(self, pick: Pick) -> Sequence[int]:
        return range(self.length)


class ShardedOrder(Order):
    """Images of a few shards at a time, each shard read once an epoch.

    `lanes` shards are open at once; position p is in lane p mod lanes. Each epoch deals the permuted shards to the
    lanes, and a lane shows its shards one after the other, the images of each permuted. A lane whose shards hold less
    begins its next epoch earlier, so that none waits for another. With W processes that divide the lanes each process
    has lanes, and so shards, of its own.
    """

    def __init__(self, shards: Sequence[int], seed: int, size: tuple[int, int], lanes: int) -> None:
        super().__init__(seed, size)
        self.lengths = np.asarray(shards, dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._filled = np.flatnonzero(self.lengths)
        self.lanes = min(lanes, len(self._filled))
        self._epochs = [(-1, 0, 0)] * self.lanes  # of each lane: epoch, its first step, the step after its last
        self._dealt: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._inside: dict[int, tuple[int, torch.Tensor]] = {}

    def index_at(self, position: int) -> int:
        lane, step = position % self.lanes, position // self.lanes
        epoch, start, end = self._epochs[lane] if self._epochs[lane][1] <= step else (-1, 0, 0)
        while step >= end:
            epoch, start = epoch + 1, end
            end += int(self._deal(epoch, lane)[1][-1])
        self._epochs[lane] = (epoch, start, end)
        shards, ends = self._deal(epoch, lane)
        turn = int(np.searchsorted(ends, step - start, side="right"))
        shard, within = int(shards[turn]), step - start - (int(ends[turn - 1]) if turn else 0)
        return int(self.starts[shard]) + int(self._permuted(lane, epoch, shard)[within])

    def alike(self, pick: Pick) -> Sequence[int]:
        shard = int(np.searchsorted(self.starts, pick.number, side="right")) - 1
        return range(int(self.starts[shard]), int(self.starts[shard] + self.lengths[shard]))

    def fitting(self, pick: Pick) -> Sequence[int]:
        return range(int(self.lengths.sum()))

    def _deal(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards of a lane in an epoch, how many images there are up to the end of each)"""
        key = epoch * self.lanes + lane
        if key not in self._dealt:
            if len(self._dealt) > 4 * self.lanes:
                self._dealt.clear()
            order = permutation(len(self._filled), self.seed, epoch, SHARDS).numpy()[lane :: self.lanes]
            self._dealt[key] = self._filled[order], np.cumsum(self.lengths[self._filled[order]])
        return self._dealt[key]

    def _permuted(self, lane: int, epoch: int, shard: int) -> torch.Tensor:
        key = epoch * len(self.lengths) + shard
        if self._inside.get(lane, (-1,))[0] != key:
            self._inside[lane] = key, permutation(int(self.lengths[shard]), self.seed, epoch, shard, LANE)
        return self._inside[lane][1]


class EndlessSampler(Sampler[Pick]):
    """The picks of an order for ever. Rank r of W takes positions r, r + W, r + 2 W, ..."""

    def __init__(self, order: Order, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.order, self.start, self.rank, self.world_size = order, start, rank, world_size

    def __iter__(self) -> Iterator[Pick]:
        position = self.start + self.rank
        while True:
            yield self.order.pick(position)
            position += self.world_size
