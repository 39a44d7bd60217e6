"""The order of training images as a function of (seed, position): stateless, the same for any workers and ranks.

`position` counts samples since update 0 over all ranks. Every random choice about a sample is seeded by it. There are
three orders: everything shuffled, shard by shard, or in aspect-ratio buckets of one shape each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch.utils.data import Sampler

from vae.config.data import DataConfig, bucket_shapes
from vae.data.decode import ImageError
from vae.data.shards import Shards
from vae.data.sources import Skipped, Source
from vae.errors import InputError

INSTEAD, SHARDS, LANE = 1, 2, 3  # purposes of a seed, besides the permutation of an epoch
NEAR = 20  # attempts among images of the same group


class SampleIndex(NamedTuple):
    """The image (its `number` in the source) at a position, and the `size` (height, width) it is cut to."""

    position: int
    number: int
    size: tuple[int, int]


def seed_for(*parts: int) -> int:
    """Mix several non-negative integers into one 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def permutation(length: int, *parts: int) -> torch.Tensor:
    """Return a random permutation of `length` numbers, which is a function of the integers `parts`."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_for(*parts)))


class Order(ABC):
    """An order of images: (seed, position) -> an image. Each epoch shows every image, in a new order."""

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        self.seed = seed
        self.size = size

    def pick(self, position: int) -> SampleIndex:
        """Return the image at a position, and the size it is cut to."""
        return SampleIndex(position, self.index_at(position), self.size)

    def replacement(self, pick: SampleIndex, attempt: int) -> SampleIndex:
        """Return another image for the same place, where the one at hand cannot be used.

        The first attempts choose from its group, the later ones from all that fit.
        """
        others = self.same_group(pick) if attempt < NEAR else self.candidates(pick)
        return pick._replace(number=int(others[seed_for(self.seed, pick.position, attempt, INSTEAD) % len(others)]))

    @abstractmethod
    def index_at(self, position: int) -> int:
        """Return the number of the image at a position."""

    def fingerprint(self) -> str:
        """Hash what the order depends on, besides the seed and the number of images."""
        return ""

    @abstractmethod
    def same_group(self, pick: SampleIndex) -> Sequence[int]:
        """Return the images that replace this one best, itself among them.

        They are those of the same bucket or the same shard.
        """

    @abstractmethod
    def candidates(self, pick: SampleIndex) -> Sequence[int]:
        """Return all images that could stand in its place."""


class Shuffled(Order):
    """Every image anywhere: each epoch is a permutation of all images."""

    def __init__(self, length: int, seed: int, size: tuple[int, int]) -> None:
        super().__init__(seed, size)
        self.length = length
        self._epoch = -1
        self._order = torch.empty(0)

    def index_at(self, position: int) -> int:
        """Return the number of the image at a position. Each epoch has a permutation of its own."""
        if position // self.length != self._epoch:
            self._epoch = position // self.length
            self._order = permutation(self.length, self.seed, self._epoch)
        return int(self._order[position % self.length])

    def same_group(self, pick: SampleIndex) -> Sequence[int]:
        """Return all images."""
        return range(self.length)

    def candidates(self, pick: SampleIndex) -> Sequence[int]:
        """Return all images."""
        return range(self.length)


class ShardedOrder(Order):
    """Images of a few shards at a time. Each shard is read once an epoch.

    `lanes` shards are open at once, and position p is in lane p mod lanes. Each epoch deals the permuted shards to the
    lanes. A lane shows its shards one after the other, the images of each permuted. A lane whose shards hold fewer
    images begins its next epoch earlier, so that no lane waits for another. With W processes, where W divides the
    lanes, each process has lanes, and so shards, of its own.
    """

    def __init__(self, shards: Sequence[int], seed: int, size: tuple[int, int], lanes: int) -> None:
        super().__init__(seed, size)
        self.lengths = np.asarray(shards, dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._filled = np.flatnonzero(self.lengths)
        self.lanes = min(lanes, len(self._filled))
        self._epochs = [(-1, 0, 0)] * self.lanes  # of each lane: epoch, first step, step after the last
        self._dealt: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._inside: dict[int, tuple[int, torch.Tensor]] = {}

    def index_at(self, position: int) -> int:
        """Return the number of the image at a position, from the shard that is open in its lane."""
        lane = position % self.lanes
        step = position // self.lanes
        epoch, start, end = self._epochs[lane] if self._epochs[lane][1] <= step else (-1, 0, 0)

        # Lanes have epochs of different lengths, so the epoch is found by counting on from where the lane was last.
        while step >= end:
            epoch, start = epoch + 1, end
            end += int(self._deal(epoch, lane)[1][-1])
        self._epochs[lane] = (epoch, start, end)

        shards, ends = self._deal(epoch, lane)
        turn = int(np.searchsorted(ends, step - start, side="right"))
        shard = int(shards[turn])
        within = step - start - (int(ends[turn - 1]) if turn else 0)

        return int(self.starts[shard]) + int(self._permuted(lane, epoch, shard)[within])

    def same_group(self, pick: SampleIndex) -> Sequence[int]:
        """Return the images of its shard."""
        shard = int(np.searchsorted(self.starts, pick.number, side="right")) - 1
        return range(int(self.starts[shard]), int(self.starts[shard] + self.lengths[shard]))

    def candidates(self, pick: SampleIndex) -> Sequence[int]:
        """Return all images."""
        return range(int(self.lengths.sum()))

    def _deal(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of a lane in an epoch, and the number of images up to the end of each."""
        key = epoch * self.lanes + lane
        if key not in self._dealt:
            if len(self._dealt) > 4 * self.lanes:
                self._dealt.clear()
            order = permutation(len(self._filled), self.seed, epoch, SHARDS).numpy()[lane :: self.lanes]
            self._dealt[key] = self._filled[order], np.cumsum(self.lengths[self._filled[order]])
        return self._dealt[key]

    def _permuted(self, lane: int, epoch: int, shard: int) -> torch.Tensor:
        """Return the order of a shard's images in an epoch. The last one of each lane is kept."""
        key = epoch * len(self.lengths) + shard
        if self._inside.get(lane, (-1,))[0] != key:
            self._inside[lane] = key, permutation(int(self.lengths[shard]), self.seed, epoch, shard, LANE)
        return self._inside[lane][1]


class EndlessSampler(Sampler[SampleIndex]):
    """The images of an order, without end. Rank r of W takes positions r, r + W, r + 2 W, ..."""

    def __init__(self, order: Order, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.order = order
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[SampleIndex]:
        position = self.start + self.rank
        while True:
            yield self.order.pick(position)
            position += self.world_size


PHASES, GROUPS, MEMBERS = 4, 5, 6  # further purposes of a seed
NOWHERE = -1  # no bucket


def lost_area(sizes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the share of each image's area that is lost by the largest crop with the aspect of `shape`.

    `sizes` is (N, 2): height and width. The result is (N,), from 0 to 1.
    """
    ratio = (sizes[:, 0] * shape[1]) / np.maximum(sizes[:, 1] * shape[0], 1)
    return 1.0 - np.minimum(ratio, 1.0 / np.maximum(ratio, 1e-9))


class BucketOrder(Order):
    """Batches of one shape each, from images of any shape: aspect-ratio buckets at one or several resolutions.

    A bucket is a shape (height, width) of about `resolution` squared pixels. At each resolution an image goes to the
    bucket that costs it least of its area, if that is no more than `loss` and nothing is enlarged.

    Groups of `group` images (of one update, over all processes) share a bucket, and groups come in any order. Each
    bucket shows all its images, permuted, before any of them again. It gets groups in proportion to the number of its
    images, where an image that fits several resolutions counts for a part in each. `sizes` is (N, 2): height and width,
    0 where unknown. An epoch has as many groups as there are images for, on average.
    """

    def __init__(
        self, sizes: np.ndarray, shapes: Sequence[Sequence[tuple[int, int]]], loss: float, group: int, seed: int
    ) -> None:
        super().__init__(seed, (0, 0))
        self.sizes = sizes
        self.group = group
        self.shapes = [shape for of_resolution in shapes for shape in of_resolution]

        table = _assign(sizes, shapes, loss)
        parts = (table != NOWHERE).sum(axis=1)
        self.placed = np.flatnonzero(parts)
        self.members = [np.flatnonzero((table == shape).any(axis=1)) for shape in range(len(self.shapes))]
        shares = [float((1.0 / parts[members]).sum()) for members in self.members]

        # With random phases, buckets that have a fraction of a group do not all get one in the same epoch.
        self._groups = np.array(shares) / group  # groups of each bucket in an epoch
        self._phases = np.random.default_rng(seed_for(seed, PHASES)).random(len(self.shapes))

        self._epoch = -1
        self._plan = np.empty((0, 2), np.int64)
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}

    def fingerprint(self) -> str:
        """Hash the sizes that the buckets follow from."""
        return xxhash.xxh3_128(self.sizes.astype(np.int64).tobytes()).hexdigest()

    def pick(self, position: int) -> SampleIndex:
        """Return the image at a position, and the shape of its bucket."""
        bucket, turn = self._at(position // self.group)
        place = turn * self.group + position % self.group  # in the bucket's own order, which has no end
        members = self.members[bucket]
        number = self._permuted(bucket, place // len(members))[place % len(members)]
        return SampleIndex(position, int(number), self.shapes[bucket])

    def index_at(self, position: int) -> int:
        """Return the number of the image at a position."""
        return self.pick(position).number

    def same_group(self, pick: SampleIndex) -> Sequence[int]:
        """Return the images of its bucket."""
        return cast(Sequence[int], self.members[self.shapes.index(pick.size)])

    def candidates(self, pick: SampleIndex) -> Sequence[int]:
        """Return all images that are large enough, at whatever loss of area."""
        return cast(Sequence[int], np.flatnonzero((self.sizes >= pick.size).all(axis=1)))

    def _at(self, group: int) -> tuple[int, int]:
        """Return the bucket of a group, and how many groups of that bucket come before it."""
        epoch = max(0, self._epoch)
        while epoch and self._before(epoch).sum() > group:
            epoch -= 1
        while self._before(epoch + 1).sum() <= group:
            epoch += 1

        if epoch != self._epoch:
            self._epoch = epoch
            self._plan = self._planned(epoch)

        bucket, turn = self._plan[group - self._before(epoch).sum()]
        return int(bucket), int(turn)

    def _before(self, epoch: int) -> np.ndarray:
        """Return how many groups each bucket has had before an epoch."""
        return np.floor(epoch * self._groups + self._phases).astype(np.int64)

    def _planned(self, epoch: int) -> np.ndarray:
        """Return the groups of an epoch in their order, (groups, 2).

        Each row is a bucket, and how many groups of that bucket come before.
        """
        turns = self._before(epoch)
        buckets = np.repeat(np.arange(len(turns)), self._before(epoch + 1) - turns)
        buckets = buckets[permutation(len(buckets), self.seed, epoch, GROUPS).numpy()]

        plan = np.empty((len(buckets), 2), np.int64)
        for row, bucket in enumerate(buckets):
            plan[row] = bucket, turns[bucket]
            turns[bucket] += 1
        return plan

    def _permuted(self, bucket: int, turn: int) -> np.ndarray:
        """Return a bucket's images in the order of one of its rounds."""
        if self._rounds.get(bucket, (-1,))[0] != turn:
            members = self.members[bucket]
            order = permutation(len(members), self.seed, turn, bucket, MEMBERS).numpy()
            self._rounds[bucket] = turn, members[order]
        return self._rounds[bucket][1]


def _assign(sizes: np.ndarray, shapes: Sequence[Sequence[tuple[int, int]]], loss: float) -> np.ndarray:
    """Return the best bucket of each image at each resolution, (N, resolutions).

    It is NOWHERE where every bucket would enlarge the image, or cost more of its area than `loss`.
    """
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


READERS, AT_ONCE = 8, 4096  # threads; images that are handed to them at a time

Sizes = Iterator[tuple[int, int]]
Track = Callable[[Sizes, int], Iterable[tuple[int, int]]]


def order_of(  # noqa: PLR0917
    source: Source, config: DataConfig, seed: int, group: int, multiple: int, track: Track
) -> Order:
    """Choose the order in which a source is read.

    `group` images make an update. The sides of buckets are multiples of `multiple`. `track` wraps the reading of sizes,
    to show its progress. Raises InputError where buckets would have to read remote shards, and where no image fits a
    bucket.
    """
    square = (config.resolution, config.resolution)
    if config.bucket_resolutions:
        if isinstance(source, Shards) and not source.is_local:
            given = f"data.root={config.root!r} with data.bucket_resolutions"
            raise InputError(f"{given}: buckets read shards in any order, which are elsewhere; copy them here first")

        sizes = np.fromiter(track(_sizes(source), len(source)), np.dtype((np.int64, 2)), len(source))
        shapes = [bucket_shapes(side, config.bucket_loss, multiple) for side in config.bucket_resolutions]

        order = BucketOrder(sizes, shapes, config.bucket_loss, group, seed)
        if not len(order.placed):
            wrong = f"data.bucket_resolutions={config.bucket_resolutions}: none of {len(source)} images fits a bucket"
            raise InputError(f"{wrong}; ask for smaller resolutions, or raise data.bucket_loss")
        return order

    if source.shards is not None and len(source.shards) > 1:
        return ShardedOrder(source.shards, seed, square, config.open_shards)

    return Shuffled(len(source), seed, square)


def without_bucket(source: Source, order: BucketOrder) -> list[Skipped]:
    """List the images that are in no bucket, and why."""
    return [_homeless(source, int(index)) for index in np.setdiff1d(np.arange(len(source)), order.placed)]


def _homeless(source: Source, index: int) -> Skipped:
    """Say why an image is in no bucket."""
    try:
        height, width = source.size(index)
    except ImageError as error:
        return Skipped(source.names[index], str(error), is_corrupt=True)

    reason = f"{width}x{height} pixels fit no bucket: too small for any, or too long for data.bucket_loss"
    return Skipped(source.names[index], f"{source.label(index)}: {reason}", is_corrupt=False)


def _sizes(source: Source) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of every image, from its header; zeros where it cannot be read."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(source), AT_ONCE):
            yield from readers.map(lambda index: _size(source, index), range(start, min(start + AT_ONCE, len(source))))


def _size(source: Source, index: int) -> tuple[int, int]:
    """Return (height, width) of an image, or zeros."""
    try:
        return source.size(index)
    except ImageError:
        return 0, 0
