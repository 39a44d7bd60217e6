"""Random numbers of a training image as a function of (seed, its position), whatever its batch, rank or restart."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vae.data.order import seed_for
from vae.models.posterior import DiagonalGaussian

POSTERIOR, AUGMENTATION = 1, 2  # one stream each; the images' own crops have none behind their position


def sampled(posterior: DiagonalGaussian, positions: list[int], seed: int) -> Tensor:
    return posterior.reparameterize(normal_for(positions, seed, posterior.mean))


def mean(posterior: DiagonalGaussian, *_: object) -> Tensor:
    return posterior.mode()


Latents = Callable[[DiagonalGaussian, list[int], int], Tensor]  # (posterior, positions, seed) -> (B, C, h, w)
LATENTS: dict[str, Latents] = {"sampled": sampled, "mean": mean}  # that the decoder is trained on


def normal_for(positions: list[int], seed: int, like: Tensor) -> Tensor:
    """Standard normal, of the shape of `like` (B, ...), for the posterior."""
    return torch.stack(
        [
            torch.randn(like.shape[1:], generator=generator, device=like.device, dtype=like.dtype)
            for generator in _generators(positions, seed, POSTERIOR, like.device)
        ]
    )


def uniform_for(positions: list[int], seed: int, count: int, like: Tensor) -> Tensor:
    """`count` numbers in [0, 1) for each image, (B, count), where `like` is, for the discriminator's augmentation."""
    generators = _generators(positions, seed, AUGMENTATION, like.device)
    return torch.stack([torch.rand(count, generator=generator, device=like.device) for generator in generators])


def _generators(positions: list[int], seed: int, stream: int, device: torch.device) -> Iterator[torch.Generator]:
    generator = torch.Generator(device)
    for position in positions:
        yield generator.manual_seed(seed_for(seed, position, stream))
