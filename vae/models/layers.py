"""The layers of the KL autoencoder, under the parameter names of diffusers so that its weights load as they are."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.fast import nearest_conv, norm_silu_conv, pad_conv

NORM_EPS = 1e-6  # of the released SD weights; PyTorch's default of 1e-5 is visible in their output


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
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
        return pad_conv(self.conv, x)


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nearest_conv(self.conv, x)


class _Level(nn.Module):
    """Resnets from `in_channels` to `out_channels`, each followed by attention where the level has any."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            Attention(out_channels, groups) if attention else nn.Identity() for _ in self.resnets
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


class DownBlock(_Level):
    """One level of the encoder: (B, in, H, W) -> (B, out, H/2, W/2), or the same H, W at the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, resnets, groups, attention=attention)
        self.downsamplers = nn.Sequential() if last else nn.Sequential(Downsample(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamplers(super().forward(x))


class UpBlock(_Level):
    """One level of the decoder: (B, in, H, W) -> (B, out, 2H, 2W), or the same H, W at the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, resnets: int, groups: int, *, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, resnets, groups, attention=attention)
        self.upsamplers = nn.Sequential() if last else nn.Sequential(Upsample(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(super().forward(x))


class MidBlock(nn.Module):
    """Resnet, attention (where the network has it), resnet, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups) if attention else nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))
