"""Encoding and decoding in strips of rows: images of any size in as much memory as is allowed, with the same results.

Nothing is blended: norms have the statistics of the whole image, convolutions see the rows beside a strip, and
attention sees all tokens. A layer's input is given up row by row while its output is made, so that little more than one
pair of activations exists at once. What does not fit is computed twice. Where not even one activation fits, activations
are kept elsewhere: those of a GPU in the host's memory, those of a CPU in a temporary file.
"""

import math
from collections.abc import Callable
from contextlib import closing, nullcontext

import torch
from torch import Tensor

from vae.errors import require
from vae.models.autoencoder_kl import Decoder, Encoder, as_kl
from vae.models.base import Autoencoder
from vae.models.posterior import DiagonalGaussian
from vae.models.strips.maps import Given, freed_at_once
from vae.models.strips.rowwise import USUAL_ROWS, Work, planned, refuse_changed

MB = 10**6
SMALL = 2**28  # bytes; below this, returning memory at once costs more time than it is worth
Advance = Callable[[float], object]
TINY = ("strips (--memory)", "none: it takes little memory whole")  # what is refused, and the remedy


@torch.no_grad()
def decode_in_strips(
    model: Autoencoder, latents: Tensor, memory: int | None = None, advance: Advance | None = None
) -> Tensor:
    """Decode raw latents (B, latent_channels, h, w) to images (B, C, f * h, f * w), as `model.decode` does.

    `memory` is in bytes, beyond the model, the latents, and what libraries keep to themselves (some 20 MiB on a CPU).
    None is the least that costs no time. A temporary file, where one is needed, is in `tempfile.gettempdir()`.
    `advance` is called with shares of the work that add up to 1.

    Raises InputError where `memory` is too little, with the least that would do, and where a layer has been changed or
    has a hook.
    """
    model = as_kl(model, *TINY)
    refuse_changed(model.decoder)
    _check(latents, model.config.latent_channels, memory)

    latents = model.post_quant_conv(latents.to(model.decoder.conv_in.weight))
    return _in_strips(model.decoder, latents, memory, advance)


@torch.no_grad()
def encode_in_strips(
    model: Autoencoder, images: Tensor, memory: int | None = None, advance: Advance | None = None
) -> DiagonalGaussian:
    """Encode images (B, C, H, W) in [-1, 1] to a posterior, as `model.encode` does.

    The images may stay in the host's memory. `memory`, `advance` and errors are those of `decode_in_strips`.
    """
    model = as_kl(model, *TINY)
    refuse_changed(model.encoder)
    _check(images, model.config.in_channels, memory)
    model.check_size(images)

    return DiagonalGaussian.from_moments(model.quant_conv(_in_strips(model.encoder, images, memory, advance)))


def _check(values: Tensor, channels: int, memory: int | None) -> None:
    """Raise InputError where `values` are not (B, channels, H, W), or `memory` is no number of bytes."""
    fits = values.dim() == 4 and values.shape[1] == channels
    require(fits, f"a tensor of {tuple(values.shape)}", f"(batch, {channels}, height, width)")
    require(memory is None or type(memory) is int, f"memory={memory!r}", "a number of bytes, as 2 * 10**9")


def _in_strips(half: Encoder | Decoder, values: Tensor, memory: int | None, advance: Advance | None) -> Tensor:
    """Run an encoder or decoder on `values` (B, C, H, W), one image at a time, within `memory` bytes.

    Raises InputError where `memory` is too little.
    """
    weight = half.conv_in.weight
    batch, _, height, width = values.shape
    plan = planned(half, height, width, weight.itemsize)

    # The result is there whole, however the layers are computed.
    shape = (batch, half.conv_out.out_channels, plan[-1].height, plan[-1].width)
    result = math.prod(shape) * weight.itemsize
    least = result + max(stage.strips(1) for stage in plan)
    usual = result + max(stage.maps + stage.strips(USUAL_ROWS) for stage in plan)

    allowed = usual if memory is None else memory
    given = f"{'images' if isinstance(half, Encoder) else 'latents'} of {width}x{height}"
    enough = f"at least {least} bytes ({math.ceil(least / MB)}MB) for {given}"
    require(allowed >= least, f"memory={allowed} bytes", enough)

    made = weight.new_empty(shape)
    is_small = memory is None and usual < SMALL

    # Autocast is off, because the plan's numbers of bytes are those of the weights' own dtype.
    with torch.autocast(weight.device.type, enabled=False), nullcontext() if is_small else freed_at_once():
        for number in range(batch):
            image, target = values[number : number + 1], made[number : number + 1]
            with closing(Work(half, plan, allowed - result)) as work:
                for share in work.run(Given(image, weight), target):
                    if advance is not None:
                        advance(share / batch)
    return made
