"""AutoencoderKL: the encoder and decoder of Stable Diffusion, for any widths, depths and channels.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), appendix G. Parameter names and
configuration fields are those of diffusers, so that its weights load as they are.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.base import Autoencoder, Half
from vae.models.fused import nearest_conv, norm_silu, norm_silu_conv, pad_conv
from vae.models.posterior import DiagonalGaussian

NORM_EPS = 1e-6  # of the released SD weights; PyTorch's default of 1e-5 is visible in their output


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Return a group norm with LDM's epsilon."""
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """Residual block of two convolutions. (B, in, H, W) -> (B, out, H, W).

    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add to x (B, C_in, H, W) the result of norm, SiLU and convolution, twice: (B, C_out, H, W)."""
        residual = norm_silu_conv(self.norm1, self.conv1, x)
        residual = norm_silu_conv(self.norm2, self.conv2, residual)
        return self.conv_shortcut(x) + residual


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with its residual. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Let every pixel of x (B, C, H, W) attend to every other, with one head, and add the result to x."""
        tokens = self.group_norm(x.contiguous()).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C): one head
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        attended = self.to_out(F.scaled_dot_product_attention(q, k, v))[:, 0]
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve H and W. Pads right and bottom only, as the released SD weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x with stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""
        return pad_conv(self.conv, x)


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge x and convolve it: (B, C, H, W) -> (B, C, 2H, 2W)."""
        return nearest_conv(self.conv, x)


class _Level(nn.Module):
    """Resnets from `in_channels` to `out_channels`, each followed by attention where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets

        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            Attention(out_channels, groups) if attention else nn.Identity() for _ in self.resnets
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply each resnet and the attention after it: (B, in, H, W) -> (B, out, H, W)."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


class DownBlock(_Level):
    """One level of the encoder: (B, in, H, W) -> (B, out, H/2, W/2). The last level keeps H and W."""

    def __init__(
        self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, resnets, groups, attention=attention)
        self.downsamplers = nn.Sequential() if last else nn.Sequential(Downsample(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the level, then halve H and W unless it is the last: (B, C_in, H, W) -> (B, C_out, H/2, W/2)."""
        return self.downsamplers(super().forward(x))


class UpBlock(_Level):
    """One level of the decoder: (B, in, H, W) -> (B, out, 2H, 2W). The last level keeps H and W."""

    def __init__(
        self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, resnets, groups, attention=attention)
        self.upsamplers = nn.Sequential() if last else nn.Sequential(Upsample(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the level, then double H and W unless it is the last: (B, C_in, H, W) -> (B, C_out, 2H, 2W)."""
        return self.upsamplers(super().forward(x))


class MidBlock(nn.Module):
    """Residual block, attention where the network has it, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups) if attention else nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """Apply residual block, attention, residual block: (B, C, H, W) -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


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
        """Encode images (B, C, H, W) in [-1, 1] into moments (B, 2 * latent channels, H/f, W/f)."""
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = self.run(block, x)
        x = self.run(self.mid_block, x)

        return _never_in_float16(self.conv_out, norm_silu(self.conv_norm_out, x))


class Decoder(Half):
    """Latents (B, latent_channels, H/f, W/f) -> images (B, out_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
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
        """Compute everything before `conv_out`: the input of the last layer, (B, block_out_channels[0], H, W)."""
        x = self.run(self.mid_block, self.conv_in(latents))
        for block in self.up_blocks:
            x = self.run(block, x)

        return norm_silu(self.conv_norm_out, x)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, latent channels, h, w) into images (B, C, f * h, f * w), about [-1, 1], not clamped."""
        return self.conv_out(self.features(latents))


class AutoencoderKL(Autoencoder[Encoder, Decoder]):
    """Images in [-1, 1] <-> posterior over raw, unscaled latents.

    `quant_conv` and `post_quant_conv` are the 1x1 convolutions of LDM, or identities where the configuration has none.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels

        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()

        self._narrow_posterior()

    def _narrow_posterior(self) -> None:
        """Start with a narrow posterior, of which a sample is near the mean.

        With a random logvar about 0 the noise of an untrained encoder drowns its signal.
        """
        last = self.quant_conv if isinstance(self.quant_conv, nn.Conv2d) else self.encoder.conv_out
        assert last.bias is not None
        with torch.no_grad():
            last.bias[self.config.latent_channels :] = INITIAL_LOGVAR

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] into posteriors over raw latents (B, latent channels, H/f, W/f).

        Raises InputError where H or W is not a multiple of f.
        """
        self.check_size(images)
        return DiagonalGaussian.from_moments(_never_in_float16(self.quant_conv, self.encoder(images)))

    def decode_features(self, latents: Tensor) -> Tensor:
        """Compute the input of the last layer (B, C, f * h, f * w) from raw latents (B, latent channels, h, w)."""
        weight = next(self.decoder.conv_in.parameters())  # posteriors are float32 even where weights are half precision
        return self.decoder.features(self.post_quant_conv(latents.to(weight.dtype)))

    @property
    def last_layer(self) -> nn.Conv2d:
        """Return the convolution that turns features into images."""
        return self.decoder.conv_out

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the large pieces in order of use: the units of `torch.compile` and of gradient checkpointing."""
        yield from self.encoder.down_blocks
        yield self.encoder.mid_block
        yield self.decoder.mid_block
        yield from self.decoder.up_blocks


def _never_in_float16(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x), in float32 where autocast would compute in float16: for layers that make moments.

    The gradient of the KL term at a log-variance is 1e-6 (its weight) divided by the number of elements of all images.
    Even with a loss scale of 2**16 it is below float16's smallest number, and such a layer would receive a gradient of
    zero.
    """
    device = x.device.type
    if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16):
        return layer(x)

    dtype = next((parameter.dtype for parameter in layer.parameters()), torch.float32)
    with torch.autocast(device, enabled=False):
        return layer(x.to(dtype))


def as_kl(model: Autoencoder, given: str, remedy: str) -> AutoencoderKL:
    """Return `model` as an AutoencoderKL, for what other autoencoders do not have.

    Raises InputError where it is another: `given` names what is asked of it, `remedy` what is expected instead.
    """
    require(isinstance(model, AutoencoderKL), f"{given} with a {model.config.architecture} autoencoder", remedy)
    assert isinstance(model, AutoencoderKL)
    return model
