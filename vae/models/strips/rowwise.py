"""One image's way through an encoder or decoder in strips of rows, within a number of bytes.

`planned` says what each layer asks of memory, before anything is computed. `Work` then decides for every activation
whether it is kept, computed twice, or kept elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae.errors import InputError
from vae.models.autoencoder_kl import (
    Attention,
    Decoder,
    DownBlock,
    Downsample,
    Encoder,
    MidBlock,
    ResnetBlock,
    UpBlock,
    Upsample,
)
from vae.models.fused import HALF, SAME, Shape, is_as_made, is_plain_conv, is_plain_norm
from vae.models.strips.maps import (
    Attended,
    Convolved,
    Downsampled,
    Filed,
    Map,
    Normed,
    Recent,
    Statistics,
    Stored,
    Sum,
    Upsampled,
)

# Rows of a strip: the least with which maps are kept rather than computed twice, the default, and the most.
LEAST_ROWS, USUAL_ROWS, MOST_ROWS = 16, 32, 64
HALO = 4  # rows: two convolutions computed at once, above and below
ALIVE = 3  # rows of a layer's input and output that exist at once, for each row that is asked for
KERNELS = 5  # copies of an upsampling's kernel that exist at once, while it is rearranged
POINT: Shape = ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")  # a shortcut
BLOCKS = (Encoder, Decoder, DownBlock, UpBlock, MidBlock, ResnetBlock, Attention, Downsample, Upsample)
AROUND = (nn.ModuleList, nn.Sequential, nn.Identity)


@dataclass(frozen=True)
class Stage:
    """A layer and what it asks of memory. `height` and `width` are its output's; the rest is in bytes.

    `row` is alive for each row of a strip. `maps` are its input and output at most, where all are kept. `beside` are
    keys and values, and copies of weights in another order.
    """

    layer: nn.Module
    height: int
    width: int
    row: int
    maps: int
    beside: int

    def strips(self, rows: int) -> int:
        """Return the bytes that strips of `rows` rows take."""
        return self.beside + self.row * (rows + HALO)

    @property
    def work(self) -> int:
        """The layer's cost, in proportion to its multiplications; attention's products are not counted."""
        return sum(each.numel() for each in self.layer.parameters()) * self.height * self.width


def refuse_changed(half: Encoder | Decoder) -> None:
    """Raise InputError where a layer has been changed in a way that strips would ignore.

    Parameters are read here, and few layers are called. The projections of an attention are called, whatever stands in
    for them, though not with all tokens at once.
    """
    side = "encoder" if isinstance(half, Encoder) else "decoder"
    called = {each for block in half.modules() if isinstance(block, Attention) for each in _projections(block)}
    for name, layer in half.named_modules():
        if not (is_as_made(layer) and (layer in called or _is_known(layer))):
            raise InputError(
                f"{side}.{name} is not as it was made, expected layers without hooks, adapters or another padding in "
                f"strips; take the image whole, or merge the change into the weights"
            )


def _projections(block: Attention) -> Iterator[nn.Module]:
    """Yield the modules of an attention's projections."""
    for each in (block.to_q, block.to_k, block.to_v, block.to_out):
        yield from each.modules()


def _is_known(layer: nn.Module) -> bool:
    """Say whether a layer is one that strips compute as its class does."""
    if isinstance(layer, nn.Conv2d):
        return any(is_plain_conv(layer, shape) for shape in (SAME, HALF, POINT))
    return is_plain_norm(layer) or type(layer) in BLOCKS + AROUND


def planned(half: Encoder | Decoder, height: int, width: int, itemsize: int) -> list[Stage]:
    """Return the stages for an input of `height` x `width`, in order."""
    plan: list[Stage] = []
    for layer in (half.conv_in, *_layers(half), half.conv_out):
        plan.append(_stage(layer, height, width, itemsize))
        height, width = plan[-1].height, plan[-1].width
    return plan


def _layers(half: Encoder | Decoder) -> Iterator[nn.Module]:
    """Yield the layers between the first and the last convolution, in order."""
    middle = half.mid_block
    encodes = isinstance(half, Encoder)
    if not encodes:
        yield from _in_turn(middle)

    for block in half.down_blocks if isinstance(half, Encoder) else half.up_blocks:
        assert isinstance(block, DownBlock | UpBlock)
        yield from _in_turn(block)
        yield from block.downsamplers if isinstance(block, DownBlock) else block.upsamplers

    if encodes:
        yield from _in_turn(middle)


def _in_turn(block: DownBlock | UpBlock | MidBlock) -> Iterator[nn.Module]:
    """Yield the resnets of a block, each with the attention after it, if any."""
    attentions = [*block.attentions, nn.Identity()]  # the last resnet in the middle has none
    for resnet, attention in zip(block.resnets, attentions, strict=False):
        yield from (layer for layer in (resnet, attention) if not isinstance(layer, nn.Identity))


def _stage(layer: nn.Module, height: int, width: int, itemsize: int) -> Stage:
    """Return what a layer asks of memory for an input of `height` x `width`."""
    taken, made = _channels(layer)
    scale = 0.5 if isinstance(layer, Downsample) else 1.0
    if isinstance(layer, Upsample):
        scale = 2.0
    high, wide = int(height * scale), int(width * scale)
    taken, made = taken * width * itemsize, made * wide * itemsize  # a row

    attends, is_resnet = isinstance(layer, Attention), isinstance(layer, ResnetBlock)

    # An attention's products take as much again as its input and output.
    row = ALIVE * int(taken / min(scale, 1.0) + made) * (2 if attends else 1)
    maps = max(taken * height, made * high * (2 if is_resnet else 1))  # two maps exist between a resnet's convolutions

    kernels = sum(each.nbytes for each in layer.parameters()) * (KERNELS if scale > 1.0 else 1)
    return Stage(layer, high, wide, row, maps, beside=kernels + (2 * taken * height if attends else 0))


def _channels(layer: nn.Module) -> Sequence[int]:
    """Return the channels that a layer takes and those that it makes."""
    if isinstance(layer, Attention):
        return layer.group_norm.num_channels, layer.group_norm.num_channels
    conv = layer.conv1 if isinstance(layer, ResnetBlock) else getattr(layer, "conv", layer)
    assert isinstance(conv, nn.Conv2d)
    return conv.in_channels, conv.out_channels


PRODUCTS = 3  # copies of attention's products, where torch has no kernel that avoids them


class Work:
    """One image's way through the layers, in `memory` bytes."""

    def __init__(self, half: Encoder | Decoder, plan: list[Stage], memory: int) -> None:
        self.half = half
        self.plan = plan
        self.memory = memory
        self.weight = half.conv_in.weight
        self.row = self.beside = self.reserve = 0
        self.stored: list[Stored] = []

    def run(self, given: Map, target: Tensor) -> Iterator[float]:
        """Fill `target` from `given`. Yields the shares of the work as they are done; they add up to 1."""
        last = len(self.plan) - 1
        total = sum(stage.work for stage in self.plan)
        x = given

        for number, stage in enumerate(self.plan):
            # A map that computes rows on demand has its own rows alive beside this stage's.
            self.row = stage.row + (self.row if isinstance(x, Recent) else 0)
            self.beside = stage.beside
            # What is stored must leave room for strips of this layer and of the next.
            self.reserve = max(each.strips(LEAST_ROWS) for each in self.plan[number : number + 2])
            if number < last:
                x = STEPS[type(stage.layer)](self, x, stage.layer)
            else:
                self._finish(x, target)
            yield stage.work / total

    def close(self) -> None:
        """Drop every map that is kept."""
        for each in self.stored:
            each.close()

    def convolution(self, x: Map, layer: nn.Conv2d) -> Map:
        """Add a convolution, and keep its result."""
        return self._keep(Convolved(x, layer))[0]

    def resnet(self, x: Map, layer: ResnetBlock) -> Map:
        """Add a residual block, and keep its result.

        The map between its convolutions, `hidden`, is kept if it fits, and otherwise computed twice.
        """
        hidden = Convolved(Normed(x, layer.norm1, self._statistics(x)), layer.conv1)
        skip = Convolved(x, layer.conv_shortcut) if isinstance(layer.conv_shortcut, nn.Conv2d) else x

        apart = skip is not x and isinstance(x, Stored)  # then x can be dropped row by row while the two are made
        parts = [hidden, skip] if apart else [hidden]
        if self._fits(*parts, release=apart) or _is_elsewhere(x):
            hidden, *others = self._keep(*parts, release=apart)
            skip = others[0] if others else skip
        else:
            hidden = Recent(hidden)

        branch = Convolved(Normed(hidden, layer.norm2, self._statistics(hidden)), layer.conv2)
        return self._keep(Sum(branch, skip))[0]

    def attention(self, x: Map, layer: Attention) -> Map:
        """Add an attention, which sees all pixels before it gives its first row. Its result is kept."""
        made = Attended(x, layer, self._statistics(x))

        for top, bottom in self._strips(x):
            made.look(top, bottom)

        room = (self.memory - self.beside - self._held()) // 2
        made.queries = max(room // (PRODUCTS * x.height * x.width * self.weight.itemsize), 1)
        return self._keep(made)[0]

    def upsampling(self, x: Map, layer: Upsample) -> Map:
        """Add an upsampling. Its result is kept if it fits, and otherwise computed whenever its reader asks."""
        made = Upsampled(x, layer)
        return self._keep(made)[0] if self._fits(made) or _is_elsewhere(x) else Recent(made)

    def downsampling(self, x: Map, layer: Downsample) -> Map:
        """Add a downsampling, and keep its result."""
        return self._keep(Downsampled(x, layer))[0]

    def _finish(self, x: Map, target: Tensor) -> None:
        """Fill `target` with the last norm, SiLU and convolution of x."""
        made = Convolved(Normed(x, self.half.conv_norm_out, self._statistics(x)), self.half.conv_out)
        for top, bottom in self._strips(made, release=True):
            target[:, :, top:bottom] = made.rows(top, bottom)

    def _statistics(self, x: Map) -> Statistics:
        """Return the statistics of a map. They cost a pass over it where it is not stored."""
        if isinstance(x, Stored):
            return x.statistics
        statistics = Statistics(self.weight)
        for top, bottom in self._strips(x):
            statistics.add(x.rows(top, bottom))
        return statistics

    def _keep(self, *maps: Map, release: bool = True) -> list[Stored]:
        """Compute maps of one height and store them. With `release` what they are made of is dropped meanwhile."""
        inside = self._fits(*maps, release=release)
        kept = [self._store(each, inside=inside) for each in maps]
        self.stored = [each for each in self.stored if not each.is_closed] + kept

        taken = sum(map(self._bytes, maps)) if inside else 0
        for top, bottom in self._strips(*maps, taken=taken, release=release):
            for source, target in zip(maps, kept, strict=True):
                target.append(source.rows(top, bottom))

        return kept

    def _store(self, like: Map, *, inside: bool) -> Stored:
        """Return an empty stored map: where the work is done if `inside`, else in the host's memory or a file."""
        device = self.weight.device
        if inside or device.type != "cpu":
            return Stored(like, self.weight, device if inside else torch.device("cpu"))
        return Filed(like, self.weight)

    def _strips(self, *maps: Map, taken: int = 0, release: bool = False) -> Iterator[tuple[int, int]]:
        """Yield (top, bottom) of strips as high as the remaining memory allows, when `taken` bytes will be stored.

        With `release` the rows that no later strip needs are dropped after each strip.
        """
        room = self.memory - self.beside - self._most(taken, release=release)
        height = maps[0].height
        count = -(-height // min(max(room // self.row - HALO, 1), MOST_ROWS))

        for number in range(count):
            top = height * number // count
            bottom = height * (number + 1) // count
            yield top, bottom
            if release:
                _give_up(maps, bottom)

    def _fits(self, *maps: Map, release: bool = True) -> bool:
        """Say whether maps can be stored where the work is done, and this layer and the next still have room."""
        return self._most(sum(map(self._bytes, maps)), release=release) + self.reserve <= self.memory

    def _most(self, taken: int, *, release: bool) -> int:
        """Return the bytes that are stored at worst, while `taken` bytes are added.

        With `release` old rows are dropped as fast as new ones come.
        """
        held = self._held()
        return max(held, taken + (0 if release else held))

    def _held(self) -> int:
        """Return the bytes that are stored now, where the work is done."""
        return sum(each.nbytes for each in self.stored)

    def _bytes(self, x: Map) -> int:
        """Return the bytes of a whole map."""
        return x.channels * x.height * x.width * self.weight.itemsize


def _give_up(maps: Sequence[Map], top: int) -> None:
    """Drop the stored rows that only rows above `top` of `maps` were made of."""
    first: dict[Stored, int] = {}
    for each in maps:
        for stored, row in each.needs(top):
            assert isinstance(stored, Stored)
            first[stored] = min(row, first.get(stored, row))

    # At the end nothing of them is needed any more.
    for stored, row in first.items():
        stored.close() if top == maps[0].height else stored.release(row)


def _is_elsewhere(x: Map) -> bool:
    """Say whether a map is stored outside the memory where the work is done."""
    return isinstance(x, Stored) and not x.is_inside


STEPS: dict[type[nn.Module], Callable[[Work, Map, Any], Map]] = {  # Any, because each takes its own kind of layer
    nn.Conv2d: Work.convolution,
    ResnetBlock: Work.resnet,
    Attention: Work.attention,
    Upsample: Work.upsampling,
    Downsample: Work.downsampling,
}
