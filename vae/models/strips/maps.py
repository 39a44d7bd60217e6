"""Maps: activations (1, C, H, W) that are read in strips of rows, and need not exist as a whole.

Readers go from top to bottom, once or several times. Beyond its borders a map is zero where a convolution pads. Most
maps compute their rows when they are asked for. The stored ones keep them: where the work is done, in the host's
memory, or in a temporary file.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.autoencoder_kl import Attention, Downsample, Upsample
from vae.models.posterior import at_least_float32


class Statistics:
    """Mean and variance of each channel of a map, whose rows come in strips.

    Strips are merged in float64 by the formula of Chan, Golub and LeVeque (1983).
    """

    def __init__(self, weight: Tensor) -> None:
        self.count = 0
        self.mean = self.squares = weight.new_zeros((), dtype=torch.float64)  # sums of squared deviations from the mean
        self.dtype = at_least_float32(weight[:0]).dtype

    def add(self, strip: Tensor) -> None:
        """Add rows (1, C, n, W). They are summed in float32 or better."""
        values = at_least_float32(strip)
        count = values.shape[2] * values.shape[3]
        mean = values.mean(dim=(0, 2, 3))
        squares = (values - mean[:, None, None]).square_().sum(dim=(0, 2, 3)).double()

        total = self.count + count
        shift = mean.double() - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel's group, both (C,)."""
        means, squares = (each.view(groups, -1) for each in (self.mean, self.squares))
        mean = means.mean(dim=1, keepdim=True)

        # A group's variance is the mean variance of its channels plus the variance of their means.
        variance = (squares / self.count + (means - mean).square()).mean(dim=1, keepdim=True)

        every = means.shape[1]
        return (
            mean.flatten().repeat_interleave(every).to(self.dtype),
            variance.flatten().repeat_interleave(every).to(self.dtype),
        )


class Map:
    """A map that gives rows.

    `rows(top, bottom)` is (1, channels, bottom - top, width) with channels last, so that whole rows are one piece of
    memory. `sources` are the maps that it is computed from.
    """

    def __init__(self, channels: int, height: int, width: int, *sources: "Map") -> None:
        self.channels = channels
        self.height = height
        self.width = width
        self.sources = sources

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows from `top` to below `bottom`, (1, C, bottom - top, W)."""
        raise NotImplementedError

    def reach(self, top: int) -> int:
        """Return the first row of the sources that is needed for the rows from `top` on."""
        return top

    def needs(self, top: int) -> "Iterator[tuple[Map, int]]":
        """Yield each stored map below this one, with its first row that is needed for the rows from `top` on.

        A map may come twice.
        """
        for source in self.sources:
            yield from source.needs(self.reach(top))


class Given(Map):
    """A tensor (1, C, H, W) that is there already. Its strips are moved to where the weights are."""

    def __init__(self, values: Tensor, weight: Tensor) -> None:
        super().__init__(values.shape[1], values.shape[2], values.shape[3])
        self.values = values
        self.weight = weight

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows with channels last, on the device and in the dtype of the weights."""
        rows = self.values[:, :, top:bottom].to(self.weight)
        return rows.contiguous(memory_format=torch.channels_last)


class Recent(Map):
    """A map that keeps the rows it gave last.

    The next request begins with some of them, and only the rest is computed.
    """

    def __init__(self, source: Map) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        self.start = 0
        self.end = 0
        self.kept = torch.empty(0)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows. Those that were asked for last are not computed again."""
        if not self.start <= top < self.end:
            self.kept = torch.empty(0)  # freed first, so that old and new rows are not there together
            self.start = top
            self.end = bottom
            self.kept = self.sources[0].rows(top, bottom)
        elif bottom > self.end:
            old = self.kept[:, :, top - self.start :].clone()
            self.kept = torch.empty(0)
            self.kept = torch.cat([old, self.sources[0].rows(self.end, bottom)], dim=2)
            self.start = top
            self.end = bottom

        return self.kept[:, :, top - self.start : bottom - self.start]


class Normed(Map):
    """Group norm with statistics of the whole map, then SiLU.

    Statistics and weights make one scale and shift for each channel, which is what batch norm computes in evaluation.
    """

    def __init__(self, source: Map, norm: nn.GroupNorm, statistics: Statistics, *, silu: bool = True) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        mean, variance = statistics.of_groups(norm.num_groups)
        self.statistics = (mean, variance, norm.weight.to(mean), norm.bias.to(mean))
        self.eps, self.silu = norm.eps, silu

    def rows(self, top: int, bottom: int) -> Tensor:
        """Normalise rows with the statistics of the whole map, and apply SiLU where it is wanted."""
        normed = F.batch_norm(self.sources[0].rows(top, bottom), *self.statistics, False, 0.0, self.eps)
        return F.silu(normed, inplace=True) if self.silu else normed


class Convolved(Map):
    """A convolution with stride 1. A strip's halo consists of real rows, and of zeros at the map's borders."""

    def __init__(self, source: Map, conv: nn.Conv2d) -> None:
        super().__init__(conv.out_channels, source.height, source.width, source)
        self.conv = conv
        self.halo = conv.kernel_size[0] // 2

    def rows(self, top: int, bottom: int) -> Tensor:
        """Convolve rows together with the rows beside them. Beyond the borders are zeros."""
        first = self.reach(top)
        last = min(bottom + self.halo, self.height)
        above = first - top + self.halo
        below = bottom + self.halo - last
        x = self.sources[0].rows(first, last)
        if above or below:
            x = F.pad(x, (0, 0, above, below))

        # Only columns are padded by the convolution: the rows above and below are there already.
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=(0, self.halo))

    def reach(self, top: int) -> int:
        """Return the topmost row that the kernel reaches."""
        return max(top - self.halo, 0)


class Sum(Map):
    """Sum of a branch and its skip connection.

    `branch` is read first, because it asks for more rows of what the two may share.
    """

    def __init__(self, branch: Map, skip: Map) -> None:
        super().__init__(branch.channels, branch.height, branch.width, branch, skip)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Add the rows of the skip connection to those of the branch."""
        branch, skip = self.sources
        return branch.rows(top, bottom).add_(skip.rows(top, bottom))


class Upsampled(Map):
    """An upsampling layer.

    It is applied to rows with one more on either side, and its wrong outermost rows are not kept.
    """

    def __init__(self, source: Map, layer: Upsample) -> None:
        super().__init__(source.channels, 2 * source.height, 2 * source.width, source)
        self.layer = layer

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows of the enlarged map."""
        first = self.reach(top)
        last = min(bottom // 2 + 1, self.height // 2)
        made = self.layer(self.sources[0].rows(first, last))
        return made[:, :, top - 2 * first : bottom - 2 * first].clone(memory_format=torch.channels_last)

    def reach(self, top: int) -> int:
        """Return the row of the small map that row `top` begins with."""
        return max((top - 1) // 2, 0)


class Downsampled(Map):
    """A downsampling layer: its convolution, padded on the right and at the very bottom."""

    def __init__(self, source: Map, layer: Downsample) -> None:
        super().__init__(source.channels, source.height // 2, source.width // 2, source)
        self.layer = layer

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows of the reduced map, padded as the layer pads."""
        x = self.sources[0].rows(2 * top, min(2 * bottom + 1, 2 * self.height))
        return self.layer.conv(F.pad(x, (0, 1, 0, int(bottom == self.height))))

    def reach(self, top: int) -> int:
        """Return the row of the large map that row `top` begins with."""
        return 2 * top


class Attended(Map):
    """Self-attention with its residual.

    All keys and values are there at once. `queries` says how many of the queries are computed together.
    """

    def __init__(self, source: Map, layer: Attention, statistics: Statistics) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        self.layer = layer
        self.queries = 1
        self.normed = Normed(source, layer.group_norm, statistics, silu=False)
        weight = layer.group_norm.weight
        tokens = source.height * source.width
        self.keys, self.values = (weight.new_empty(1, 1, tokens, source.channels) for _ in range(2))

    def look(self, top: int, bottom: int) -> None:
        """Compute the keys and values of these rows. It is called for all rows before any row is asked for."""
        tokens = _tokens(self.normed.rows(top, bottom))
        place = slice(top * self.width, bottom * self.width)
        self.keys[:, :, place], self.values[:, :, place] = self.layer.to_k(tokens), self.layer.to_v(tokens)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Let the pixels of some rows attend to all pixels, `queries` at a time."""
        queries = self.layer.to_q(_tokens(self.normed.rows(top, bottom)))
        attended = torch.empty_like(queries)
        for here, part in zip(attended.split(self.queries, 2), queries.split(self.queries, 2), strict=True):
            here.copy_(F.scaled_dot_product_attention(part, self.keys, self.values))

        made = self.layer.to_out(attended).view(1, bottom - top, self.width, self.channels).permute(0, 3, 1, 2)
        return made.add_(self.sources[0].rows(top, bottom))


def _tokens(x: Tensor) -> Tensor:
    """Return pixels (1, C, n, W) as tokens (1, 1, n * W, C).

    They have four dimensions, because with three torch computes all products at once.
    """
    return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1])


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's mallopt
MIB = 2**20


class Stored(Map):
    """A map that is kept, as the strips in which it was made. Each is dropped when it will not be read again.

    `weight` gives dtype and device of the work, `place` the device where strips are kept.
    """

    def __init__(self, like: Map, weight: Tensor, place: torch.device) -> None:
        super().__init__(like.channels, like.height, like.width)
        self.statistics = Statistics(weight)
        self.device, self.dtype, self.place = weight.device, weight.dtype, place
        self.strips: list[tuple[int, Tensor]] = []  # the first row of each
        self.filled, self.is_closed = 0, False
        self.is_inside = self.place == self.device  # on the device where the work is done

    @property
    def nbytes(self) -> int:
        """The bytes that it takes where the work is done."""
        return sum(strip.nbytes for _, strip in self.strips) if self.is_inside else 0

    def append(self, strip: Tensor) -> None:
        """Add the next rows (1, C, n, W), and count them in the statistics."""
        self.statistics.add(strip)
        self.write(strip)
        self.filled += strip.shape[2]

    def write(self, strip: Tensor) -> None:
        """Keep a strip where the map is kept."""
        self.strips.append((self.filled, strip.to(self.place)))

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return kept rows, on the device where the work is done."""
        parts = [
            strip[:, :, max(top - first, 0) : bottom - first].to(self.device)
            for first, strip in self.strips
            if first < bottom and first + strip.shape[2] > top
        ]

        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def needs(self, top: int) -> Iterator[tuple[Map, int]]:
        """Yield only itself: what it was made of is no longer needed."""
        yield self, top

    def release(self, top: int) -> None:
        """Drop the strips above `top`, which will not be asked for again."""
        while self.strips and self.strips[0][0] + self.strips[0][1].shape[2] <= top:
            del self.strips[0]

    def close(self) -> None:
        """Drop everything that is kept."""
        self.strips.clear()
        self.is_closed = True


class Filed(Stored):
    """A stored map in a file without a name, of which nothing remains however the process ends."""

    def __init__(self, like: Map, weight: Tensor) -> None:
        super().__init__(like, weight, weight.device)
        self.is_inside = False
        self.file = TemporaryFile()  # noqa: SIM115
        self.row_bytes = self.channels * self.width * weight.itemsize

    def write(self, strip: Tensor) -> None:
        """Write a strip to the file, row by row with channels last."""
        self.file.seek(self.filled * self.row_bytes)
        self.file.write(_as_bytes(strip.permute(0, 2, 3, 1).contiguous()))

    def rows(self, top: int, bottom: int) -> Tensor:
        """Read rows back from the file."""
        made = torch.empty(1, bottom - top, self.width, self.channels, dtype=self.dtype)
        self.file.seek(top * self.row_bytes)
        read = self.file.readinto(_as_bytes(made))
        assert read == made.nbytes
        return made.permute(0, 3, 1, 2)

    def close(self) -> None:
        """Drop everything that is kept, and the file."""
        super().close()
        self.file.close()


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Return memory to the system as soon as a tensor of a MiB or more is freed within the block. That costs time.

    Otherwise glibc keeps much of it, about 100 MiB here. The values set at the end are those where glibc's own
    adjustments end.
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
    """Return a contiguous tensor's memory as bytes."""
    return x.flatten().view(torch.uint8).numpy().data
