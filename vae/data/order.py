"""The order of training images as a function of (seed, position): stateless, the same for any workers and ranks.

`position` counts samples since update 0 over all ranks; every random choice about a sample is seeded by it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several non-negative integers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EndlessSampler(Sampler[tuple[int, int]]):
    """(position, index) for ever, each epoch a new permutation. Rank r of W takes positions r, r + W, r + 2 W, ..."""

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world_size = length, seed, start, rank, world_size

        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        while True:
            yield position, self.index_at(position)
            position += self.world_size

    def index_at(self, position: int) -> int:
        """Which image stands at a position."""
        if position // self.length != self._epoch:
            self._epoch = position // self.length
            generator = torch.Generator().manual_seed(seed_for(self.seed, self._epoch))
            self._order = torch.randperm(self.length, generator=generator)
        return int(self._order[position % self.length])
