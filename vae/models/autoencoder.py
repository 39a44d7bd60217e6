"""AutoencoderKL: the encoder and decoder of Stable Diffusion, for any widths, depths and channels.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), appendix G.
Parameter names and configuration fields are those of diffusers.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae.errors import require
from vae.models.autoencoder_config import AutoencoderConfig
from vae.models.fast import norm_silu
from vae.models.layers import DownBlock, MidBlock, UpBlock, group_norm
from vae.models.posterior import DiagonalGaussian

INITIAL_LOGVAR = -6.0  # a standard deviation of 0.05


class _Half(nn.Module):
    """What encoder and decoder share: running their blocks, recomputed in backward where memory is dearer than time."""

    gradient_checkpointing = False

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # No block draws random numbers, whose state would be waited for.
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
        return block(x)


class Encoder(_Half):
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
            x = self._run(block, x)
        x = self._run(self.mid_block, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(_Half):
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
        x = self._run(self.mid_block, self.conv_in(latents))
        for block in self.up_blocks:
            x = self._run(block, x)
        return norm_silu(self.conv_norm_out, x)

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.features(latents))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> posterior over raw, unscaled latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
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
        """Images (B, C, H, W) in [-1, 1]; H and W multiples of `config.downsample_factor`."""
        self.check_size(images)
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(images)))

    def check_size(self, images: Tensor) -> None:
        """Raises InputError where H or W is no multiple of `config.downsample_factor`."""
        (height, width), factor = images.shape[-2:], self.config.downsample_factor
        fits = height % factor == width % factor == 0
        require(fits, f"images are {width}x{height} pixels", f"multiples of {factor}; crop or pad them first")

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, latent_channels, h, w) -> images (B, C, f * h, f * w), about [-1, 1] and not clamped."""
        return self.decoder.conv_out(self.decode_features(latents))

    def decode_features(self, latents: Tensor) -> Tensor:
        """`decode` without the last layer."""
        weight_dtype = self.decoder.conv_in.weight.dtype  # posteriors are float32 also where the weights are half
        return self.decoder.features(self.post_quant_conv(latents.to(weight_dtype)))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """(reconstructions from one posterior sample, posterior)."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the blocks' inputs for backward and recompute the rest: less memory, about a third more time."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

    def blocks(self) -> Iterator[nn.Module]:
        """The large pieces in order of use: the units of `torch.compile` and of gradient checkpointing."""
        yield from self.encoder.down_blocks
        yield self.encoder.mid_block
        yield self.decoder.mid_block
        yield from self.decoder.up_blocks
