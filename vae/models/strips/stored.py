"""Maps that are kept: where the work is done, in the host's memory, or in a temporary file."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import torch
from torch import Tensor

from vae.models.strips.maps import Map
from vae.models.strips.statistics import Statistics

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's mallopt
MIB = 2**20


class Stored(Map):
    """Strips as they were made, each dropped when it will not be read again. `weight` says type and device."""

    def __init__(self, like: Map, weight: Tensor, place: torch.device) -> None:
        super().__init__(like.channels, like.height, like.width)
        self.statistics = Statistics(weight)
        self.device, self.dtype, self.place = weight.device, weight.dtype, place
        self.strips: list[tuple[int, Tensor]] = []  # the first row of each
        self.filled, self.is_closed = 0, False
        self.is_inside = self.place == self.device  # where the work is done

    @property
    def nbytes(self) -> int:
        """What it takes there."""
        return sum(strip.nbytes for _, strip in self.strips) if self.is_inside else 0

    def append(self, strip: Tensor) -> None:
        """The next rows (1, C, n, W)."""
        self.statistics.add(strip)
        self.write(strip)
        self.filled += strip.shape[2]

    def write(self, strip: Tensor) -> None:
        self.strips.append((self.filled, strip.to(self.place)))

    def rows(self, top: int, bottom: int) -> Tensor:
        parts = [
            strip[:, :, max(top - first, 0) : bottom - first].to(self.device)
            for first, strip in self.strips
            if first < bottom and first + strip.shape[2] > top
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def needs(self, top: int) -> Iterator[tuple[Map, int]]:
        yield self, top

    def release(self, top: int) -> None:
        """Rows above `top` will not be asked for again."""
        while self.strips and self.strips[0][0] + self.strips[0][1].shape[2] <= top:
            del self.strips[0]

    def close(self) -> None:
        self.strips.clear()
        self.is_closed = True


class Filed(Stored):
    """In a file without a name, of which nothing is left however the process ends."""

    def __init__(self, like: Map, weight: Tensor) -> None:
        super().__init__(like, weight, weight.device)
        self.is_inside = False
        self.file = TemporaryFile()  # noqa: SIM115
        self.row_bytes = self.channels * self.width * weight.itemsize

    def write(self, strip: Tensor) -> None:
        self.file.seek(self.filled * self.row_bytes)
        self.file.write(_as_bytes(strip.permute(0, 2, 3, 1).contiguous()))

    def rows(self, top: int, bottom: int) -> Tensor:
        made = torch.empty(1, bottom - top, self.width, self.channels, dtype=self.dtype)
        self.file.seek(top * self.row_bytes)
        read = self.file.readinto(_as_bytes(made))
        assert read == made.nbytes
        return made.permute(0, 3, 1, 2)

    def close(self) -> None:
        super().close()
        self.file.close()


@contextmanager
def freed_at_once() -> Iterator[None]:
    """What tensors of a MiB and more took goes back to the system with them, which costs time.

    glibc else keeps much of it, about 100 MiB here. What is set afterwards is where its own adjustments end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, MIB)
    mallopt(TRIM_THRESHOLD, MIB)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, 32 * MIB)
        mallopt(TRIM_THRESHOLD, 64 * MIB)


def _as_bytes(x: Tensor) -> memoryview:
    return x.flatten().view(torch.uint8).numpy().data
