"""LPIPS, the learned perceptual distance, as a loss and as a metric.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), version 0.1: frozen
ImageNet features, compared channel by channel after unit normalisation and weighted by heads from the `lpips` package.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from vae.errors import InputError
from vae.models.backbones import BACKBONES, Backbone
from vae.models.features import Features, load_backbone
from vae.models.posterior import at_least_float32

IMAGE_MEAN = (-0.030, -0.088, -0.188)  # ImageNet statistics restated for images in [-1, 1]
IMAGE_STD = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10
SQUARE_FLOOR = 1e-30  # changes no value, and keeps the root's gradient finite where a whole feature column is zero


class LPIPS(nn.Module):
    """Two batches of images (B, C, H, W) in [-1, 1] -> distances (B,), float32 or better.

    Frozen for good: no gradients of its own, and in eval mode whatever `train()` is asked of it. `as_rgb` says which
    channels it sees. `path` names a features file in place of the sources of `load_backbone`, the last of which is the
    network, with `download`.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        net: str = "vgg",
        path: str | Path | None = None,
        channels: Sequence[int] | None = None,
        *,
        download: bool = True,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise InputError(f"LPIPS net {net!r}, expected one of {sorted(BACKBONES)}")
        self.net, self.channels, backbone = net, channels, BACKBONES[net]
        self.slices = _slices(backbone, load_backbone(net, path, download=download))
        self.heads = nn.ParameterList(_heads(net))
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode."""
        return super().train(False)

    def sees(self, channels: int) -> bool:
        """Whether images of so many channels: of two nobody can tell which is what, unless they are chosen."""
        return self.channels is not None or channels != 2

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        distances = [
            ((a - b).square() * head).sum(dim=1).mean(dim=(1, 2))
            for a, b, head in zip(self._features(images), self._features(reconstructions), self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Unit-normalised features at every tap, each (B, C_i, H_i, W_i), one after the other: they are large."""
        x = (as_rgb(at_least_float32(images), self.channels) - self.image_mean) / self.image_std
        for piece in self.slices:
            x = piece(x)
            norm = x.square().sum(dim=1, keepdim=True).clamp_min(SQUARE_FLOOR).sqrt()
            yield x / (norm + NORM_EPS)


def as_rgb(images: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as (B, 3, H, W): grey repeated, RGBA composited on white, of more the first three.

    Or the three `channels` that are named, whatever there are.
    """
    if channels is not None:
        return images[:, list(channels)]
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1.0) / 2.0
        return images[:, :3] * alpha + (1.0 - alpha)
    return images[:, :3]


def _slices(backbone: Backbone, features: Features) -> nn.ModuleList:
    """The backbone cut behind each tap."""
    convolutions = {index: rest for index, *rest in backbone.convolutions}

    def layer(index: int) -> nn.Module:
        if index in backbone.pools:
            return nn.MaxPool2d(backbone.pools[index], stride=2)
        if index not in convolutions:
            return nn.ReLU()
        in_channels, out_channels, kernel, stride, padding = convolutions[index]
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
        convolution.load_state_dict({part: features[f"features.{index}.{part}"] for part in ("weight", "bias")})
        return convolution

    ends = [-1, *backbone.taps]
    return nn.ModuleList(nn.Sequential(*map(layer, range(a + 1, b + 1))) for a, b in pairwise(ends))


def _heads(net: str) -> list[Tensor]:
    """The non-negative channel weights (1, C_i, 1, 1) of LPIPS v0.1, from the lpips package, which is not imported."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise InputError("LPIPS needs the heads in the package lpips: pip install lpips==0.1.4")
    path = Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{tap}.model.1.weight"] for tap in range(len(BACKBONES[net].taps))]
