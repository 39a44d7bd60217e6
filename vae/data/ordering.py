"""Which order a source is read in: everything shuffled, shard by shard, or in buckets of one shape."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vae.data.buckets import BucketOrder, bucket_shapes
from vae.data.config import DataConfig
from vae.data.images import ImageError
from vae.data.loading import LeftOut
from vae.data.order import Order, ShardedOrder, Shuffled
from vae.data.shards import Shards
from vae.data.sources import Source
from vae.errors import InputError

READERS, AT_ONCE = 8, 4096

Sizes = Iterator[tuple[int, int]]
Track = Callable[[Sizes, int], Iterable[tuple[int, int]]]


def order_of(  # noqa: PLR0917
    source: Source, config: DataConfig, seed: int, group: int, multiple: int, track: Track
) -> Order:
    """`group` images make an update; sides of buckets are multiples of `multiple`; `track` shows how far sizes are."""
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


def without_bucket(source: Source, order: BucketOrder) -> list[LeftOut]:
    """The images that are in no bucket, and why."""
    return [_homeless(source, int(index)) for index in np.setdiff1d(np.arange(len(source)), order.placed)]


def _homeless(source: Source, index: int) -> LeftOut:
    try:
        height, width = source.size(index)
    except ImageError as error:
        return LeftOut(source.names[index], str(error), is_corrupt=True)
    reason = f"{width}x{height} pixels fit no bucket: too small for any, or too long for data.bucket_loss"
    return LeftOut(source.names[index], f"{source.label(index)}: {reason}", is_corrupt=False)


def _sizes(source: Source) -> Iterator[tuple[int, int]]:
    """(height, width) of every image, from its header; zeros where it cannot be read."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(source), AT_ONCE):
            yield from readers.map(lambda index: _size(source, index), range(start, min(start + AT_ONCE, len(source))))


def _size(source: Source, index: int) -> tuple[int, int]:
    try:
        return source.size(index)
    except ImageError:
        return 0, 0
