"""What each layer of an encoder or decoder asks of memory, before anything is computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vae.errors import InputError
from vae.models.autoencoder import Decoder, Encoder
from vae.models.fast import HALF, SAME, Shape, is_as_made, is_plain_conv, is_plain_norm
from vae.models.layers import Attention, DownBlock, Downsample, MidBlock, ResnetBlock, UpBlock, Upsample

LEAST_ROWS, USUAL_ROWS, MOST_ROWS = 16, 32, 64  # of a strip: to keep maps rather than compute twice; by default; ever
HALO = 4  # rows: two convolutions computed at once, above and below
ALIVE = 3  # rows of a layer's input and output there at once, for each row that is asked for
KERNELS = 5  # of an upsampling there at once, while its kernel is rearranged
POINT: Shape = ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")  # a shortcut
BLOCKS = (Encoder, Decoder, DownBlock, UpBlock, MidBlock, ResnetBlock, Attention, Downsample, Upsample)
AROUND = (nn.ModuleList, nn.Sequential, nn.Identity)


@dataclass(frozen=True)
class Stage:
    """A layer whose output has `height` rows; the rest in bytes.

    row: alive for each row of a strip; maps: input and output at most, where all are kept; beside: keys and values,
    copies of weights in another order.
    """

    layer: nn.Module
    height: int
    width: int
    row: int
    maps: int
    beside: int

    def strips(self, rows: int) -> int:
        return self.beside + self.row * (rows + HALO)

    @property
    def work(self) -> int:
        """In proportion to multiplications, attention's products apart."""
        return sum(each.numel() for each in self.layer.parameters()) * self.height * self.width


def refuse_changed(half: Encoder | Decoder) -> None:
    """Raises InputError where a layer would not be obeyed: parameters are read here, and few layers are called.

    Those of an attention's projections are called, whatever stands in for them, if not with all tokens at once.
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
    for each in (block.to_q, block.to_k, block.to_v, block.to_out):
        yield from each.modules()


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return any(is_plain_conv(layer, shape) for shape in (SAME, HALF, POINT))
    return is_plain_norm(layer) or type(layer) in BLOCKS + AROUND


def planned(half: Encoder | Decoder, height: int, width: int, itemsize: int) -> list[Stage]:
    """For an input of `height` x `width`, in order."""
    plan: list[Stage] = []
    for layer in (half.conv_in, *_layers(half), half.conv_out):
        plan.append(_stage(layer, height, width, itemsize))
        height, width = plan[-1].height, plan[-1].width
    return plan


def _layers(half: Encoder | Decoder) -> Iterator[nn.Module]:
    middle, encodes = half.mid_block, isinstance(half, Encoder)
    if not encodes:
        yield from _in_turn(middle)
    for block in half.down_blocks if isinstance(half, Encoder) else half.up_blocks:
        assert isinstance(block, DownBlock | UpBlock)
        yield from _in_turn(block)
        yield from block.downsamplers if isinstance(block, DownBlock) else block.upsamplers
    if encodes:
        yield from _in_turn(middle)


def _in_turn(block: DownBlock | UpBlock | MidBlock) -> Iterator[nn.Module]:
    """Resnets, each with the attention after it, if any."""
    attentions = [*block.attentions, nn.Identity()]  # the last resnet in the middle has none
    for resnet, attention in zip(block.resnets, attentions, strict=False):
        yield from (layer for layer in (resnet, attention) if not isinstance(layer, nn.Identity))


def _stage(layer: nn.Module, height: int, width: int, itemsize: int) -> Stage:
    taken, made = _channels(layer)
    scale = 2.0 if isinstance(layer, Upsample) else 0.5 if isinstance(layer, Downsample) else 1.0
    high, wide = int(height * scale), int(width * scale)
    taken, made = taken * width * itemsize, made * wide * itemsize  # a row
    attends, is_resnet = isinstance(layer, Attention), isinstance(layer, ResnetBlock)
    row = ALIVE * int(taken / min(scale, 1.0) + made) * (2 if attends else 1)  # as much again for its products
    maps = max(taken * height, made * high * (2 if is_resnet else 1))  # between its convolutions there are two
    kernels = sum(each.nbytes for each in layer.parameters()) * (KERNELS if scale > 1.0 else 1)
    return Stage(layer, high, wide, row, maps, beside=kernels + (2 * taken * height if attends else 0))


def _channels(layer: nn.Module) -> Sequence[int]:
    """Taken and made."""
    if isinstance(layer, Attention):
        return layer.group_norm.num_channels, layer.group_norm.num_channels
    conv = layer.conv1 if isinstance(layer, ResnetBlock) else getattr(layer, "conv", layer)
    assert isinstance(conv, nn.Conv2d)
    return conv.in_channels, conv.out_channels
