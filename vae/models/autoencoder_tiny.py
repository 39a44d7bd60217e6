"""AutoencoderTiny: 2.4 million parameters where AutoencoderKL has 84, for scaled latents.

The network is TAESD (Bohan, github.com/madebyollin/taesd, 2023). `mid_block_pool` adds the pooling of TAEF2, its
sibling for FLUX.2. Latents are those that diffusion models see. Parameter names are those of diffusers'
AutoencoderTiny.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.models.base import Autoencoder, Half
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian

LATENT_MAGNITUDE = 3  # the decoder cannot distinguish values far beyond it
POOL_GROUPS, POOL_EXPANSION = 4, 4  # TAEF2's


class TinyBlock(nn.Module):
    """Three convolutions and a residual: (B, C, H, W) -> (B, C, H, W), 0 or more.

    With `pool` the block first adds what the norms of four groups of channels know of the whole image.
    """

    def __init__(self, channels: int, *, pool: bool) -> None:
        super().__init__()
        self.pool = _pool(channels) if pool else None
        self.conv = nn.Sequential(
            _conv(channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the pool if there is one, then the convolutions with their residual. The shape stays (B, C, H, W)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _Layers(Half):
    """Layers one after the other, numbered as in the published files."""

    layers: nn.Sequential

    def through(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Apply `layers` to x in turn. Only the blocks are recomputed by gradient checkpointing."""
        for layer in layers:
            x = self.run(layer, x) if isinstance(layer, TinyBlock) else layer(x)
        return x


class TinyEncoder(_Layers):
    """Images (B, in_channels, H, W) in [-1, 1] -> latents (B, latent_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[0]

        layers: list[nn.Module] = []
        for level in range(len(config.block_out_channels)):
            layers += [_conv(width, width, stride=2, bias=False) if level else _conv(config.in_channels, width)]
            layers += _blocks(config, level)

        self.layers = nn.Sequential(*layers, _conv(width, config.latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] into scaled latents (B, latent channels, H/f, W/f)."""
        return self.through(self.layers, (images + 1) / 2)


class TinyDecoder(_Layers):
    """Latents (B, latent_channels, H/f, W/f) -> images (B, out_channels, H, W) in about [0, 1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[0]

        layers: list[nn.Module] = [_conv(config.latent_channels, width), nn.ReLU()]
        for level in reversed(range(len(config.block_out_channels))):
            layers += _blocks(config, level)
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)] if level else []

        self.layers = nn.Sequential(*layers, _conv(width, config.out_channels))

    def features(self, latents: Tensor) -> Tensor:
        """Compute everything before the last layer: latents -> (B, width, H, W)."""
        return self.through(self.layers[:-1], LATENT_MAGNITUDE * torch.tanh(latents / LATENT_MAGNITUDE))


class AutoencoderTiny(Autoencoder[TinyEncoder, TinyDecoder]):
    """Images in [-1, 1] <-> scaled latents, as diffusion models see them. The posterior has no width.

    Its log-variance is the smallest one possible: a sample equals the mean to 3e-7, and the KL has no meaning.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] into posteriors without width, whose mean is the latent.

        Raises InputError where H or W is not a multiple of f.
        """
        self.check_size(images)
        mean = self.encoder(images)
        return DiagonalGaussian(mean, torch.full_like(mean, LOGVAR_RANGE[0]))

    def decode_features(self, latents: Tensor) -> Tensor:
        """Compute the input of the last layer (B, C, f * h, f * w) from latents (B, latent channels, h, w)."""
        return self.decoder.features(latents.to(next(self.decoder.parameters()).dtype))

    @property
    def last_layer(self) -> nn.Conv2d:
        """Return the convolution that turns features into images."""
        return cast(nn.Conv2d, self.decoder.layers[-1])

    def to_images(self, features: Tensor) -> Tensor:
        """Apply the last layer and map [0, 1] to [-1, 1]: features -> images, about [-1, 1] and not clamped."""
        return 2 * self.last_layer(features) - 1

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the blocks in order of use: the units of `torch.compile` and of gradient checkpointing."""
        for half in (self.encoder, self.decoder):
            yield from (layer for layer in half.layers if isinstance(layer, TinyBlock))


def _blocks(config: AutoencoderConfig, level: int) -> list[TinyBlock]:
    """Return the blocks of one level, where level 0 is full resolution."""
    pool = config.mid_block_pool and level == len(config.block_out_channels) - 1
    count = config.layers_per_block if level else 1
    return [TinyBlock(config.block_out_channels[level], pool=pool) for _ in range(count)]


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a 3x3 convolution with a padding of 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _pool(channels: int) -> nn.Sequential:
    """Return TAEF2's pool: 1x1 convolution, group norm and ReLU, 1x1 convolution. (B, C, H, W) -> (B, C, H, W)."""
    inside = POOL_EXPANSION * channels
    return nn.Sequential(
        nn.Conv2d(channels, inside, 1, bias=False),
        nn.GroupNorm(POOL_GROUPS, inside),
        nn.ReLU(),
        nn.Conv2d(inside, channels, 1, bias=False),
    )
