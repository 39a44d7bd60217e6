"""What becomes of one image when its latents or pixels are disturbed, or the way it is coded.

Probes yield what was done and decibels between images as they are shown, rounded to uint8: infinite where the two are
identical, NaN where one is not finite.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vae.data.transforms import to_model_range, to_uint8
from vae.evaluation.tiling import OVERLAP, tiled
from vae.metrics.psnr import psnr
from vae.models.posterior import DiagonalGaussian

LATENT_NOISE = (0.1, 0.3, 0.5, 1.0)  # of the latents' standard deviation
INPUT_NOISE = (10, 25)  # standard deviation in grey levels of 255
MASKS = (("random", 0.25), ("random", 0.5), ("block", 0.25))  # shape, share of the pixels
ROUNDS = 10

Made = tuple[dict[str, Any], dict[str, float]]  # what was done, decibels by name
Measured = Iterator[Made]


class Autoencoder(Protocol):
    """An autoencoder, or the encoder of one and the decoder of another."""

    def encode(self, images: Tensor, /) -> DiagonalGaussian: ...

    def decode(self, latents: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """An image (1, C, H, W) in [-1, 1], the mode of its posterior, what is decoded from that, and the noise's seed."""

    image: Tensor
    latents: Tensor
    reconstruction: Tensor
    seed: int

    @property
    def factor(self) -> int:
        return self.image.shape[-1] // self.latents.shape[-1]

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, drawn on the CPU: the same for every strength of a disturbance and on every device."""
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed)).to(like)


def decibels(image: Tensor, expected: Tensor) -> float:
    """Of two images (1, C, ...) in about [-1, 1]."""
    if not (image.isfinite().all() and expected.isfinite().all()):
        return math.nan
    return psnr(to_uint8(expected), to_uint8(image)).item()


def coded(model: Autoencoder, image: Tensor) -> Tensor:
    return model.decode(model.encode(image).mode())


def latent_noise(model: Autoencoder, of: Subject, spread: float) -> Measured:
    """Gaussian noise on the latents, in shares of their standard deviation `spread`."""
    noise = of.noise(of.latents)
    for share in LATENT_NOISE:
        disturbed = model.decode(of.latents + share * spread * noise)
        yield {"noise": share}, {"psnr": decibels(disturbed, of.image)}


def input_noise(model: Autoencoder, of: Subject) -> Measured:
    """Gaussian noise on the pixels, clamped: `input` is the noisy image, `psnr` what coding makes of it."""
    noise = of.noise(of.image)
    for levels in INPUT_NOISE:
        noisy = (of.image + levels / 127.5 * noise).clamp(-1.0, 1.0)
        yield {"levels": levels}, {"input": decibels(noisy, of.image), "psnr": decibels(coded(model, noisy), of.image)}


def masked(model: Autoencoder, of: Subject) -> Measured:
    """Pixels replaced by mid-grey: `input` is that image, `psnr` what coding makes of it; `masked` of those pixels."""
    for shape, share in MASKS:
        mask = _mask(of, shape, share)
        damaged = of.image.masked_fill(mask, 0.0)
        restored = coded(model, damaged)
        yield (
            {"mask": shape, "share": share},
            {
                "input": decibels(damaged, of.image),
                "input_masked": decibels(damaged[..., mask], of.image[..., mask]),
                "psnr": decibels(restored, of.image),
                "psnr_masked": decibels(restored[..., mask], of.image[..., mask]),
            },
        )


def drift(model: Autoencoder, of: Subject) -> Measured:
    """Coded again and again, each time from the rounded image: as when somebody edits, saves and edits."""
    image = of.reconstruction
    for count in range(1, ROUNDS + 1):
        if count > 1 and image.isfinite().all():
            image = coded(model, to_model_range(to_uint8(image)))
        yield {"round": count}, {"psnr": decibels(image, of.image)}


def tiles(model: Autoencoder, of: Subject, tile: int) -> Measured:
    """Tiles of `tile` latent cells against the whole: only decoded so, or encoded too; `to_image` is of the latter."""
    pixels = tile * of.factor
    decoded = tiled(model.decode, of.latents, tile, pixels)
    latents = tiled(lambda image: model.encode(image).mode(), of.image, pixels, tile)
    both = tiled(model.decode, latents, tile, pixels)
    yield (
        {"tile": pixels, "overlap": OVERLAP},
        {
            "decoded": decibels(decoded, of.reconstruction),
            "encoded_and_decoded": decibels(both, of.reconstruction),
            "to_image": decibels(both, of.image),
        },
    )


def _mask(of: Subject, shape: str, share: float) -> Tensor:
    """(H, W): single pixels anywhere, or one centred block of the image's aspect."""
    height, width = of.image.shape[-2:]
    if shape == "random":
        chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(of.seed))
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[chosen[: round(share * height * width)]] = True
        return mask.view(height, width).to(of.image.device)
    rows, columns = (round(side * math.sqrt(share)) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    mask = torch.zeros(height, width, dtype=torch.bool, device=of.image.device)
    mask[top : top + rows, left : left + columns] = True
    return mask
