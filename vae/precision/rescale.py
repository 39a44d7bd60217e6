"""Rescaling of weights: smaller activations, the same function, so that nothing overflows float16.

All factors are powers of two. Every layer that reads the residual stream is either a GroupNorm, which does not see a
factor, or a linear layer, which can undo it. A stream begins anew at certain linear layers: the first convolution,
down- and upsampling, and a shortcut that changes the width. Between two of these, everything that writes into the
stream may be scaled by one factor. `conv1` of a resnet is read by `norm2` alone, so it has a factor of its own. `to_v`
of an attention has one that `to_out` undoes.

Only GroupNorm's epsilon (1e-6) sees the difference, which is why nothing is scaled further than it must be.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.models.autoencoder_kl import Attention, AutoencoderKL, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from vae.precision.audit import FLOAT16_MAX, HEADROOM, PrecisionAudit

EQUAL = 1e-4  # largest difference of images in [-1, 1] that counts as exact


@dataclass
class _Stream:
    """A residual stream from the linear layer that begins it to the next such layer. Layers are given by name."""

    begins: str
    writers: list[str] = field(default_factory=list)  # layers whose weight and bias are scaled
    sums: list[str] = field(default_factory=list)  # blocks whose output is the stream itself

    def peak(self, audit: PrecisionAudit) -> float:
        """Return the largest activation in the stream and in what is written into it."""
        return max(audit.peaks.get(name, 0.0) for name in (self.begins, *self.writers, *self.sums))


class Rescaled(NamedTuple):
    """The number of rescaled `layers`, and the largest differences of images and latents that this made."""

    layers: int
    images: float
    latents: float
    largest_latent: float

    @property
    def is_exact(self) -> bool:
        """Whether images and latents are the same up to `EQUAL`. False also where something is NaN."""
        return self.images <= EQUAL and self.latents <= EQUAL * max(1.0, self.largest_latent)


@torch.no_grad()
def rescale_checked(model: AutoencoderKL, audit: PrecisionAudit, images: Sequence[Tensor]) -> Rescaled:
    """Rescale `model` in place, and compare its images and latents before and after.

    `images` are (B, C, H, W) in [-1, 1] each.
    """
    latents = [model.encode(image).mode() for image in images]
    exact = [model.decode(latent) for latent in latents]

    changed = rescale(model, audit)

    return Rescaled(
        layers=len(changed),
        images=max(float((model.decode(a) - b).abs().max()) for a, b in zip(latents, exact, strict=True)),
        latents=max(float((model.encode(a).mode() - b).abs().max()) for a, b in zip(images, latents, strict=True)),
        largest_latent=max(float(latent.abs().max()) for latent in latents),
    )


@torch.no_grad()
def rescale(model: AutoencoderKL, audit: PrecisionAudit) -> dict[str, float]:
    """Rescale `model` in place as far as its own `audit` asks.

    Returns {layer: factor} of the layers that were changed.
    """
    layers: dict[str, nn.Module] = dict(model.named_modules())
    changed: dict[str, float] = {}

    for half in ("encoder", "decoder"):
        before = 1.0
        for stream in _streams(layers, half):
            factor = factor_for(stream.peak(audit))
            # This layer reads the stream before, whose factor it takes back, and writes into the new one.
            _scale(layers[stream.begins], factor / before, factor)
            for name in stream.writers:
                _scale(layers[name], factor, factor)
            changed |= {name: factor for name in (stream.begins, *stream.writers) if factor != 1.0}
            before = factor

    for name, block in layers.items():
        if isinstance(block, ResnetBlock):
            changed |= _scale_inside(block.conv1, f"{name}.conv1", audit)
        elif isinstance(block, Attention):
            inside = _scale_inside(block.to_v, f"{name}.to_v", audit)
            for factor in inside.values():
                next(block.to_out.parameters()).mul_(1.0 / factor)  # the weight
            changed |= inside
    return changed


def _streams(layers: dict[str, nn.Module], half: str) -> Iterator[_Stream]:
    """Yield the streams of the encoder or decoder (`half`) in the order of computation.

    Within each block `layers` are named in that order.
    """
    stream = _Stream(f"{half}.conv_in")

    for name in _blocks(layers, half):
        block = layers[name]
        if isinstance(block, Downsample | Upsample):
            yield stream
            stream = _Stream(f"{name}.conv")
        elif isinstance(block, Attention):
            stream.writers.append(f"{name}.to_out.0")
            stream.sums.append(name)
        elif isinstance(block, ResnetBlock):
            if isinstance(block.conv_shortcut, nn.Conv2d):
                yield stream
                stream = _Stream(f"{name}.conv_shortcut")
            stream.writers.append(f"{name}.conv2")
            stream.sums.append(name)
    yield stream


def _blocks(layers: dict[str, nn.Module], half: str) -> list[str]:
    """Return the names of a half's resnets, attentions and resamplers in the order in which `forward` meets them."""
    module = layers[half]
    assert isinstance(module, Encoder | Decoder)

    mid = [f"{half}.mid_block.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")]
    levels, resampler = ("down_blocks", "downsamplers") if isinstance(module, Encoder) else ("up_blocks", "upsamplers")

    names: list[str] = []
    for i in range(len(getattr(module, levels))):
        level = f"{half}.{levels}.{i}"
        for j in range(len(list(layers[f"{level}.resnets"].children()))):
            names += [f"{level}.resnets.{j}", f"{level}.attentions.{j}"]
        names += [f"{level}.{resampler}.0"]

    names = names + mid if isinstance(module, Encoder) else mid + names
    return [name for name in names if name in layers]


def _scale_inside(layer: nn.Module, name: str, audit: PrecisionAudit) -> dict[str, float]:
    """Scale a layer that only a GroupNorm or one other layer reads, and return {name: factor} if it changed."""
    factor = factor_for(audit.peaks.get(name, 0.0))
    _scale(layer, factor, factor)
    return {name: factor} if factor != 1.0 else {}


def factor_for(peak: float) -> float:
    """Return the largest power of two, at most 1, that brings `peak` to where float16 has the headroom asked for."""
    excess = peak * HEADROOM / FLOAT16_MAX
    return 2.0 ** -math.ceil(math.log2(excess)) if 1.0 < excess < math.inf else 1.0


def _scale(layer: nn.Module, of_weight: float, of_bias: float) -> None:
    """Multiply a layer's weight and bias in place."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.mul_(of_weight)
    bias.mul_(of_bias)
