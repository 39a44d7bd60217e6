"""Names of images by the million, and choices among them that depend on a name alone."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

CHUNK = 100_000


class Names(Sequence[str]):
    """Strings in one block of memory: ten million cost their bytes and no object each, and forked workers share them.

    Kept as the bytes that the file system has, so that names that are no UTF-8 survive.
    """

    def __init__(self, names: Any) -> None:
        """Of strings, of bytes, or of an Arrow array without nulls."""
        array: Any = names  # of pyarrow, which has no types
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        elif not isinstance(array, pa.Array):
            array = pa.array([os.fsencode(name) for name in names], type=pa.large_binary())
        self._array: Any = array.cast(pa.large_binary())

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return os.fsdecode(self._array[index].as_py())

    def __iter__(self) -> Iterator[str]:
        for names in self.encoded():
            yield from map(os.fsdecode, names)

    def encoded(self) -> Iterator[list[bytes]]:
        """All names as bytes, some at a time."""
        for start in range(0, len(self), CHUNK):
            yield self._array.slice(start, CHUNK).to_pylist()

    def take(self, indices: np.ndarray) -> "Names":
        return Names(self._array.take(pa.array(indices)))

    def hashes(self) -> np.ndarray:
        """One uint64 a name."""
        digests = (map(xxhash.xxh3_64_intdigest, names) for names in self.encoded())
        return np.fromiter(chain.from_iterable(digests), np.uint64, len(self))

    def fingerprint(self) -> str:
        """Of all names in their order."""
        digest = xxhash.xxh3_128()
        if len(self):
            _, ends, data = self._array.buffers()
            ends = np.frombuffer(ends, np.int64)[self._array.offset :][: len(self) + 1]
            digest.update(np.diff(ends).tobytes())
            digest.update(memoryview(data)[ends[0] : ends[-1]])
        return digest.hexdigest()


class Computed(Sequence[str]):
    """`name_of(number)` for numbers from 0 to below `length`, as they are asked for."""

    def __init__(self, length: int, name_of: Callable[[int], str]) -> None:
        self._length, self._name_of = length, name_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._name_of(range(self._length)[index])


def split_by_hash(names: Names, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training, validation): a name's side depends on it alone, so it survives additions to the folder.

    Validation is never empty: failing any other it gets the name with the smallest hash.
    """
    hashes = names.hashes()
    held_out = (
        hashes < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048)) if fraction < 1 else np.ones(len(hashes), bool)
    )
    held_out[np.argmin(hashes)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fewest_by_hash(names: Names, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` names, an unbiased choice that does not depend on their order; ascending."""
    if limit is None or len(names) <= limit:
        return np.arange(len(names))
    return np.sort(np.argsort(names.hashes(), kind="stable")[:limit])
