"""The base class of autoencoders: what training, measuring and use ask of one, whatever its architecture.

`build_autoencoder` builds the one that a configuration describes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.posterior import DiagonalGaussian


class Half(nn.Module):
    """The base class of encoders and decoders.

    With `gradient_checkpointing` the blocks are recomputed in backward, for when memory is scarcer than time.
    """

    gradient_checkpointing = False

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """Apply `block` to x. With gradient checkpointing its activations are computed again in backward."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # No block draws random numbers, so their state need not be saved; saving it would make the GPU wait.
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
        return block(x)


E = TypeVar("E", bound=Half, covariant=True)
D = TypeVar("D", bound=Half, covariant=True)


class Autoencoder(nn.Module, ABC, Generic[E, D]):
    """Images in [-1, 1] <-> posterior over raw, unscaled latents.

    The encoder's 1x1 convolution `quant_conv` and the decoder's `post_quant_conv` are identities where the network has
    none.
    """

    encoder: E
    decoder: D
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def is_variational(self) -> bool:
        """Whether posteriors have a width. Without one their KL divergence has no meaning."""
        return self.config.is_variational

    @abstractmethod
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] into posteriors over latents (B, latent_channels, H/f, W/f).

        H and W must be multiples of `config.downsample_factor`, f.
        """

    @abstractmethod
    def decode_features(self, latents: Tensor) -> Tensor:
        """Run `decode` without the last layer: return its input (B, width, f * h, f * w)."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Conv2d:
        """The 3x3 convolution from features to images."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """Yield the large pieces in order of use: the units of `torch.compile` and of gradient checkpointing."""

    def to_images(self, features: Tensor) -> Tensor:
        """Apply the last layer: features -> images, about [-1, 1] and not clamped."""
        return self.last_layer(features)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents (B, latent_channels, h, w) to images (B, C, f * h, f * w), about [-1, 1], not clamped."""
        return self.to_images(self.decode_features(latents))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Return (reconstructions from one sample of the posterior, posterior) of images (B, C, H, W) in [-1, 1].

        `generator` draws the sample; it must live on the images' device.
        """
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior

    def check_size(self, images: Tensor) -> None:
        """Raise InputError where H or W is not a multiple of `config.downsample_factor`."""
        height, width = images.shape[-2:]
        factor = self.config.downsample_factor
        fits = height % factor == width % factor == 0
        require(fits, f"images are {width}x{height} pixels", f"multiples of {factor}; crop or pad them first")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the blocks' inputs for backward and recompute the rest, or stop doing so.

        It takes less memory and about a third more time.
        """
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled


def network_of(config: AutoencoderConfig) -> type[Autoencoder]:
    """Return the class of the network.

    The configuration cannot refer to it, since it imports no network. So the module is found by the architecture's
    name: vae/models/autoencoder_NAME.py.
    """
    return getattr(import_module(f"vae.models.autoencoder_{config.architecture}"), config.kind.network)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder that `config.architecture` names, with random weights."""
    return network_of(config)(config)
