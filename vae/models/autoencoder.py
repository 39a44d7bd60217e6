"""AutoencoderKL: the encoder and decoder of Stable Diffusion, for any widths, depths and channels.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), appendix G.
Parameter names and configuration fields are those of diffusers.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from vae.models.autoencoder_config import AutoencoderConfig
from vae.models.fast import norm_silu
from vae.models.interface import Autoencoder, Half
from vae.models.layers import DownBlock, MidBlock, UpBlock, group_norm
from vae.models.posterior import DiagonalGaussian

INITIAL_LOGVAR = -6.0  # a standard deviation of 0.05


class Encoder(Half):
    """Images (B, in_channels, H, W) -> moments (B, 2 * latent_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, config.layers_per_block, groups, attention=i in config.attention_levels, last=i == last)
            for i, (a, b) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid_block = MidBlock(widths[-1], groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = self.run(block, x)
        x = self.run(self.mid_block, x)
        return _never_in_float16(self.conv_out, norm_silu(self.conv_norm_out, x))


class Decoder(Half):
    """Latents (B, latent_channels, H/f, W/f) -> images (B, out_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                a, b, config.layers_per_block + 1, groups, attention=last - i in config.attention_levels, last=i == last
            )
            for i, (a, b) in enumerate(pairwise([widths[0], *widths]))
        )
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        """Everything before `conv_out`: (B, block_out_channels[0], H, W), the input of the last layer."""
        x = self.run(self.mid_block, self.conv_in(latents))
        for block in self.up_blocks:
            x = self.run(block, x)
        return norm_silu(self.conv_norm_out, x)

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.features(latents))


class AutoencoderKL(Autoencoder[Encoder, Decoder]):
    """Images in [-1, 1] <-> posterior over raw, unscaled latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()

        self._narrow_posterior()

    def _narrow_posterior(self) -> None:
        """Start near the mean: with a random logvar about 0 an untrained encoder's noise drowns its signal."""
        last = self.quant_conv if isinstance(self.quant_conv, nn.Conv2d) else self.encoder.conv_out
        assert last.bias is not None
        with torch.no_grad():
            last.bias[self.config.latent_channels :] = INITIAL_LOGVAR

    def encode(self, images: Tensor) -> DiagonalGaussian:
        self.check_size(images)
        return DiagonalGaussian.from_moments(_never_in_float16(self.quant_conv, self.encoder(images)))

    def decode_features(self, latents: Tensor) -> Tensor:
        weight = next(self.decoder.conv_in.parameters())  # posteriors are float32 also where the weights are half
        return self.decoder.features(self.post_quant_conv(latents.to(weight.dtype)))

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.conv_out

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.encoder.down_blocks
        yield self.encoder.mid_block
        yield self.decoder.mid_block
        yield from self.decoder.up_blocks


def _never_in_float16(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), in float32 where autocast would compute in float16: for layers that make moments.

    The KL term's gradient at a log-variance is 1e-6 (its weight) over the elements of all images: with a loss scale of
    2**16 still below float16's smallest number, and zero is all that such a layer would learn of it from means.
    """
    device = x.device.type
    if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16):
        return layer(x)
    dtype = next((parameter.dtype for parameter in layer.parameters()), torch.float32)
    with torch.autocast(device, enabled=False):
        return layer(x.to(dtype))
