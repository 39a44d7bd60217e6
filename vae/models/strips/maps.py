"""Maps: activations (1, C, H, W) that can be asked for rows, and need not exist as a whole.

Their readers go from top to bottom, once or several times. What is zero beyond the borders is what a convolution pads.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.layers import Attention, Downsample, Upsample
from vae.models.strips.statistics import Statistics


class Map:
    """`rows(top, bottom)` is (1, channels, bottom - top, width), channels_last: whole rows are then one piece."""

    def __init__(self, channels: int, height: int, width: int, *sources: "Map") -> None:
        self.channels, self.height, self.width, self.sources = channels, height, width, sources

    def rows(self, top: int, bottom: int) -> Tensor:
        raise NotImplementedError

    def reach(self, top: int) -> int:
        """The first row of the sources that the rows from `top` on are made of."""
        return top

    def needs(self, top: int) -> "Iterator[tuple[Map, int]]":
        """Each map that is stored, and its first row that the rows from `top` on are made of; one may come twice."""
        for source in self.sources:
            yield from source.needs(self.reach(top))


class Given(Map):
    """A tensor (1, C, H, W), of which strips come to where the weights are."""

    def __init__(self, values: Tensor, weight: Tensor) -> None:
        super().__init__(values.shape[1], values.shape[2], values.shape[3])
        self.values, self.weight = values, weight

    def rows(self, top: int, bottom: int) -> Tensor:
        rows = self.values[:, :, top:bottom].to(self.weight)
        return rows.contiguous(memory_format=torch.channels_last)


class Recent(Map):
    """Keeps the rows it gave last: the next request begins with some of them, and the rest are computed."""

    def __init__(self, source: Map) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        self.start, self.end, self.kept = 0, 0, torch.empty(0)

    def rows(self, top: int, bottom: int) -> Tensor:
        if not self.start <= top < self.end:
            self.kept = torch.empty(0)  # not beside its successor
            self.start, self.end, self.kept = top, bottom, self.sources[0].rows(top, bottom)
        elif bottom > self.end:
            old = self.kept[:, :, top - self.start :].clone()
            self.kept = torch.empty(0)
            self.kept = torch.cat([old, self.sources[0].rows(self.end, bottom)], dim=2)
            self.start, self.end = top, bottom
        return self.kept[:, :, top - self.start : bottom - self.start]


class Normed(Map):
    """Group norm with statistics of the whole map, then SiLU: what batch norm in evaluation computes."""

    def __init__(self, source: Map, norm: nn.GroupNorm, statistics: Statistics, *, silu: bool = True) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        mean, variance = statistics.of_groups(norm.num_groups)
        self.statistics = (mean, variance, norm.weight.to(mean), norm.bias.to(mean))
        self.eps, self.silu = norm.eps, silu

    def rows(self, top: int, bottom: int) -> Tensor:
        normed = F.batch_norm(self.sources[0].rows(top, bottom), *self.statistics, False, 0.0, self.eps)
        return F.silu(normed, inplace=True) if self.silu else normed


class Convolved(Map):
    """A convolution with stride 1; its halo is of real rows, and of zeros at the borders."""

    def __init__(self, source: Map, conv: nn.Conv2d) -> None:
        super().__init__(conv.out_channels, source.height, source.width, source)
        self.conv, self.halo = conv, conv.kernel_size[0] // 2

    def rows(self, top: int, bottom: int) -> Tensor:
        first, last = self.reach(top), min(bottom + self.halo, self.height)
        above, below = first - top + self.halo, bottom + self.halo - last
        x = self.sources[0].rows(first, last)
        if above or below:
            x = F.pad(x, (0, 0, above, below))
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=(0, self.halo))

    def reach(self, top: int) -> int:
        return max(top - self.halo, 0)


class Sum(Map):
    """`branch` first, as it asks for more rows of what the two may share."""

    def __init__(self, branch: Map, skip: Map) -> None:
        super().__init__(branch.channels, branch.height, branch.width, branch, skip)

    def rows(self, top: int, bottom: int) -> Tensor:
        branch, skip = self.sources
        return branch.rows(top, bottom).add_(skip.rows(top, bottom))


class Upsampled(Map):
    """The layer on rows with one more on either side, whose outermost rows are wrong and not kept."""

    def __init__(self, source: Map, layer: Upsample) -> None:
        super().__init__(source.channels, 2 * source.height, 2 * source.width, source)
        self.layer = layer

    def rows(self, top: int, bottom: int) -> Tensor:
        first, last = self.reach(top), min(bottom // 2 + 1, self.height // 2)
        made = self.layer(self.sources[0].rows(first, last))
        return made[:, :, top - 2 * first : bottom - 2 * first].clone(memory_format=torch.channels_last)

    def reach(self, top: int) -> int:
        return max((top - 1) // 2, 0)


class Downsampled(Map):
    """The layer's convolution, padded on the right and at the very bottom."""

    def __init__(self, source: Map, layer: Downsample) -> None:
        super().__init__(source.channels, source.height // 2, source.width // 2, source)
        self.layer = layer

    def rows(self, top: int, bottom: int) -> Tensor:
        x = self.sources[0].rows(2 * top, min(2 * bottom + 1, 2 * self.height))
        return self.layer.conv(F.pad(x, (0, 1, 0, int(bottom == self.height))))

    def reach(self, top: int) -> int:
        return 2 * top


class Attended(Map):
    """Self-attention with its residual: all keys and values at once, `queries` of the queries."""

    def __init__(self, source: Map, layer: Attention, statistics: Statistics) -> None:
        super().__init__(source.channels, source.height, source.width, source)
        self.layer, self.queries = layer, 1
        self.normed = Normed(source, layer.group_norm, statistics, silu=False)
        weight, tokens = layer.group_norm.weight, source.height * source.width
        self.keys, self.values = (weight.new_empty(1, 1, tokens, source.channels) for _ in range(2))

    def look(self, top: int, bottom: int) -> None:
        """Take in the keys and values of these rows, before any row is asked for."""
        tokens, place = _tokens(self.normed.rows(top, bottom)), slice(top * self.width, bottom * self.width)
        self.keys[:, :, place], self.values[:, :, place] = self.layer.to_k(tokens), self.layer.to_v(tokens)

    def rows(self, top: int, bottom: int) -> Tensor:
        queries = self.layer.to_q(_tokens(self.normed.rows(top, bottom)))
        attended = torch.empty_like(queries)
        for here, part in zip(attended.split(self.queries, 2), queries.split(self.queries, 2), strict=True):
            here.copy_(F.scaled_dot_product_attention(part, self.keys, self.values))
        made = self.layer.to_out(attended).view(1, bottom - top, self.width, self.channels).permute(0, 3, 1, 2)
        return made.add_(self.sources[0].rows(top, bottom))


def _tokens(x: Tensor) -> Tensor:
    """(1, C, n, W) -> (1, 1, n * W, C); four dimensions, or torch computes all products at once."""
    return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1])
