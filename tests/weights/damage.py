"""Accidents that happen to files, drawn at random."""

import random

EDGE = 4_096  # bytes at either end of a file, which hold most of what is not values


def damaged(rng: random.Random, content: bytes) -> bytes:
    """One to three accidents, most of them near either end."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if data:
            rng.choice(DAMAGES)(rng, data, _place(rng, data))
    return bytes(data)


def flip(rng: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, at: int) -> None:
    new = rng.choice([b"\x00" * 4, b"\xff" * 8, b"\xff" * 4, rng.randbytes(3)])
    data[at : at + len(new)] = new


def _digit(rng: random.Random, data: bytearray, at: int) -> None:
    """Another digit where there is one, so that text stays text."""
    at = next((place for place in range(at, len(data)) if 48 <= data[place] < 58), at)
    data[at : at + 1] = rng.choice([b"0", b"9", b"-1", b"1e9", b"99999999999999999999"])


def _cut(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : rng.choice([len(data), at + 1, at + rng.randrange(1, 64)])]


def _insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.randbytes(rng.choice([1, 8, 64]))


def _swap(rng: random.Random, data: bytearray, at: int) -> None:
    first, second = sorted((at, _place(rng, data)))
    length = min(rng.randrange(1, 64), second - first, len(data) - second)
    one, other = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = other, one


DAMAGES = (flip, _overwrite, _digit, _cut, _insert, _swap)


def _place(rng: random.Random, data: bytearray) -> int:
    edge = min(EDGE, len(data))
    return rng.choice([rng.randrange(edge), len(data) - 1 - rng.randrange(edge), rng.randrange(len(data))])
