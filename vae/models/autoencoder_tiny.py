"""AutoencoderTiny: 2.4 million parameters where AutoencoderKL has 84, for latents as diffusion models see them.

The network of TAESD (Bohan, github.com/madebyollin/taesd, 2023), with `mid_block_pool` that of TAEF2, its sibling for
FLUX.2. Parameter names are those of diffusers' AutoencoderTiny.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.models.base import Autoencoder, Half
from vae.models.posterior import LOGVAR_RANGE, DiagonalGaussian

LATENT_MAGNITUDE = 3  # the decoder does not tell apart what lies far beyond
POOL_GROUPS, POOL_EXPANSION = 4, 4  # of TAEF2


class TinyBlock(nn.Module):
    """(B, C, H, W) -> (B, C, H, W), 0 or more: three convolutions and a residual.

    A `pool` adds what the norms of its four groups of channels know of the whole image.
    """

    def __init__(self, channels: int, *, pool: bool) -> None:
        super().__init__()
        self.pool = _pool(channels) if pool else None
        self.conv = nn.Sequential(
            _conv(channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _Layers(Half):
    """Layers one after the other, numbered as in the published files."""

    layers: nn.Sequential

    def through(self, layers: nn.Sequential, x: Tensor) -> Tensor:
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
        """Everything before the last layer: (B, width, H, W)."""
        return self.through(self.layers[:-1], LATENT_MAGNITUDE * torch.tanh(latents / LATENT_MAGNITUDE))


class AutoencoderTiny(Autoencoder[TinyEncoder, TinyDecoder]):
    """Images in [-1, 1] <-> latents as diffusion models see them, scaled already: a posterior without width.

    Its log-variance is the least there is, so that a sample is the mean to 3e-7 and its KL says nothing.
    """

    is_variational = False

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()

    def encode(self, images: Tensor) -> DiagonalGaussian:
        self.check_size(images)
        mean = self.encoder(images)
        return DiagonalGaussian(mean, torch.full_like(mean, LOGVAR_RANGE[0]))

    def decode_features(self, latents: Tensor) -> Tensor:
        return self.decoder.features(latents.to(next(self.decoder.parameters()).dtype))

    @property
    def last_layer(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.decoder.layers[-1])

    def to_images(self, features: Tensor) -> Tensor:
        return 2 * self.last_layer(features) - 1

    def blocks(self) -> Iterator[nn.Module]:
        for half in (self.encoder, self.decoder):
            yield from (layer for layer in half.layers if isinstance(layer, TinyBlock))


def _blocks(config: AutoencoderConfig, level: int) -> list[TinyBlock]:
    """Of one level, 0 being full resolution."""
    pool = config.mid_block_pool and level == len(config.block_out_channels) - 1
    count = config.layers_per_block if level else 1
    return [TinyBlock(config.block_out_channels[level], pool=pool) for _ in range(count)]


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _pool(channels: int) -> nn.Sequential:
    inside = POOL_EXPANSION * channels
    return nn.Sequential(
        nn.Conv2d(channels, inside, 1, bias=False),
        nn.GroupNorm(POOL_GROUPS, inside),
        nn.ReLU(),
        nn.Conv2d(inside, channels, 1, bias=False),
    )
