"""Smaller activations, the same function: weights rescaled by powers of two so that nothing overflows float16.

Every reader of the residual stream is a GroupNorm, which does not see a factor, or a linear layer, which can take it
back. So between two linear layers that begin a stream anew (the first convolution, down- and upsampling, a shortcut
that changes the width) everything that writes into it may be scaled by a; `conv1` of a resnet, read by `norm2` alone,
by a factor of its own; `to_v` of an attention by one that `to_out` takes back. Only GroupNorm's epsilon (1e-6) sees
the difference, which is why nothing is scaled further than it must be.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae.models.autoencoder_kl import Attention, AutoencoderKL, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from vae.precision.audit import FLOAT16_MAX, HEADROOM, PrecisionAudit

EQUAL = 1e-4  # largest difference of images in [-1, 1] that an exact rescaling may leave


@dataclass
class _Stream:
    """A residual stream from the linear layer that begins it to the next: layers that write into it, by name."""

    begins: str
    writers: list[str] = field(default_factory=list)  # scaled in weight and bias
    sums: list[str] = field(default_factory=list)  # blocks that put out the stream itself

    def peak(self, audit: PrecisionAudit) -> float:
        return max(audit.peaks.get(name, 0.0) for name in (self.begins, *self.writers, *self.sums))


class Rescaled(NamedTuple):
    """How many `layers` were rescaled, and by how much images and latents differ by it at most."""

    layers: int
    images: float
    latents: float
    largest_latent: float

    @property
    def is_exact(self) -> bool:
        """False also where something is NaN."""
        return self.images <= EQUAL and self.latents <= EQUAL * max(1.0, self.largest_latent)


@torch.no_grad()
def rescale_checked(model: AutoencoderKL, audit: PrecisionAudit, images: Sequence[Tensor]) -> Rescaled:
    """`rescale`, and what that does to `images`, each (B, C, H, W) in [-1, 1], and to their latents."""
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
    """Rescale `model` in place as far as `audit`, its own, asks; returns {layer: factor} of what was changed."""
    layers: dict[str, nn.Module] = dict(model.named_modules())
    changed: dict[str, float] = {}
    for half in ("encoder", "decoder"):
        before = 1.0
        for stream in _streams(layers, half):
            factor = factor_for(stream.peak(audit))
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
    """In the order of computation; `layers` are named in that order within each block."""
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
    """The names of a half's resnets, attentions and resamplers as `forward` meets them."""
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
    factor = factor_for(audit.peaks.get(name, 0.0))
    _scale(layer, factor, factor)
    return {name: factor} if factor != 1.0 else {}


def factor_for(peak: float) -> float:
    """The largest power of two, at most 1, that brings `peak` to where it has the headroom asked for."""
    excess = peak * HEADROOM / FLOAT16_MAX
    return 2.0 ** -math.ceil(math.log2(excess)) if 1.0 < excess < math.inf else 1.0


def _scale(layer: nn.Module, of_weight: float, of_bias: float) -> None:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.mul_(of_weight)
    bias.mul_(of_bias)
