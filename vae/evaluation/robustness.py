"""Robustness of an autoencoder: noise, missing pixels, transformed latents, repetition, tiles and half precision.

Each probe disturbs the latents or the pixels of one image, or changes the way it is coded. It yields what was done and
the PSNR in decibels between images as they are shown, rounded to uint8. The PSNR is infinite if the two are identical
and NaN if one is not finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.transforms import to_model_range, to_uint8
from vae.metrics.pixel import psnr
from vae.models import base
from vae.models.posterior import DiagonalGaussian
from vae.precision.audit import audit_precision

LATENT_NOISE = (0.1, 0.3, 0.5, 1.0)  # shares of the latents' standard deviation
INPUT_NOISE = (10, 25)  # standard deviations in grey levels, of 255
MASKS = (("random", 0.25), ("random", 0.5), ("block", 0.25))  # shape, share of the pixels
ROUNDS = 10

Made = tuple[dict[str, Any], dict[str, float]]  # what was done, decibels by name
Measured = Iterator[Made]


class EncodesAndDecodes(Protocol):
    """An autoencoder, or the encoder of one and the decoder of another."""

    def encode(self, images: Tensor, /) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] into the posterior of their latents."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Decode latents (B, c, h, w) into images, not clamped."""
        ...


@dataclass(frozen=True)
class Subject:
    """One image (1, C, H, W) in [-1, 1] with the mode of its posterior and the reconstruction from it.

    `seed` is the seed of the noise that disturbs it.
    """

    image: Tensor
    latents: Tensor
    reconstruction: Tensor
    seed: int

    @property
    def factor(self) -> int:
        """The downsampling factor: pixels along one side of a latent cell."""
        return self.image.shape[-1] // self.latents.shape[-1]

    def noise(self, like: Tensor) -> Tensor:
        """Draw standard normal noise of the shape of `like`.

        It is drawn on the CPU, so it is the same on every device, and the same for every strength of a disturbance.
        """
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed)).to(like)


def decibels(image: Tensor, expected: Tensor) -> float:
    """Compute the PSNR of two images (1, C, ...) in about [-1, 1]; NaN if one is not finite."""
    if not (image.isfinite().all() and expected.isfinite().all()):
        return math.nan
    return psnr(to_uint8(expected), to_uint8(image)).item()


def coded(model: EncodesAndDecodes, image: Tensor) -> Tensor:
    """Encode an image and decode the mode of its posterior."""
    return model.decode(model.encode(image).mode())


def latent_noise(model: EncodesAndDecodes, of: Subject, spread: float) -> Measured:
    """Add Gaussian noise to the latents, in shares of their standard deviation `spread`."""
    noise = of.noise(of.latents)
    for share in LATENT_NOISE:
        disturbed = model.decode(of.latents + share * spread * noise)
        yield {"noise": share}, {"psnr": decibels(disturbed, of.image)}


def input_noise(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Add Gaussian noise to the pixels, clamped to [-1, 1].

    `input` is the PSNR of the noisy image, and `psnr` that of its reconstruction.
    """
    noise = of.noise(of.image)
    for levels in INPUT_NOISE:
        noisy = (of.image + levels / 127.5 * noise).clamp(-1.0, 1.0)
        yield {"levels": levels}, {"input": decibels(noisy, of.image), "psnr": decibels(coded(model, noisy), of.image)}


def masked(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Replace pixels by mid-grey.

    `input` is the PSNR of the damaged image, and `psnr` that of its reconstruction. `input_masked` and `psnr_masked`
    are those of the replaced pixels alone.
    """
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


def drift(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Encode and decode again and again, each time from the image rounded to uint8.

    This is what happens to an image that is edited and saved several times.
    """
    image = of.reconstruction
    for count in range(1, ROUNDS + 1):
        if count > 1 and image.isfinite().all():
            image = coded(model, to_model_range(to_uint8(image)))
        yield {"round": count}, {"psnr": decibels(image, of.image)}


def tiles(model: EncodesAndDecodes, of: Subject, tile: int) -> Measured:
    """Compare coding in tiles of `tile` latent cells with coding the whole image.

    `decoded` only decodes in tiles, `encoded_and_decoded` also encodes in tiles, and `to_image` compares the latter
    with the image itself.
    """
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
    """Choose the pixels to replace, a mask (H, W).

    They are single pixels anywhere, or one centred block with the aspect ratio of the image.
    """
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


OVERLAP = 0.25  # share of a tile's side


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, made: int) -> Tensor:
    """Apply `function` to overlapping square tiles of x (B, C, H, W) and blend the results linearly.

    A tile of side `tile` becomes one of side `made`; both must be multiples of 4. This is what `tiled_encode` and
    `tiled_decode` of diffusers' AutoencoderKL do to images too large for memory (`enable_tiling`).
    """
    assert tile % 4 == made % 4 == 0
    step = int(tile * (1 - OVERLAP))
    blend = int(made * OVERLAP)
    rows: list[Tensor] = []
    above: list[Tensor] = []

    for top in range(0, x.shape[-2], step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[-1], step)):
            part = function(x[..., top : top + tile, left : left + tile])
            if above:
                part = _blended(above[column], part, blend, dim=-2)
            if row:
                part = _blended(row[-1], part, blend, dim=-1)
            row.append(part)

        rows.append(torch.cat([part[..., : made - blend, : made - blend] for part in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _blended(before: Tensor, after: Tensor, most: int, dim: int) -> Tensor:
    """Blend the first rows or columns of `after` with the last of `before`.

    At most `most` of them are blended, and no more than both tiles have.
    """
    extent = min(before.shape[dim], after.shape[dim], most)
    shares = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    shares = shares.view([-1, 1] if dim == -2 else [1, -1])

    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new, rest = after.split([extent, after.shape[dim] - extent], dim=dim)
    return torch.cat([old * (1 - shares) + new * shares, rest], dim=dim)


FEWEST_CELLS = 4  # along each side: fewer would leave no inner half

TRANSFORMS: Mapping[str, Callable[[Tensor, int], Tensor]] = {  # of x, and the side of a latent cell in x
    "shift": lambda x, cell: x.roll((cell, cell), dims=(-2, -1)),
    "flip": lambda x, _: x.flip(-1),
    "rotation": lambda x, _: x.rot90(1, (-2, -1)),
    "scale": lambda x, _: F.avg_pool2d(x, 2),
}


def equivariance(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Decode transformed latents: shifted by one cell, mirrored, turned by 90 degrees, or halved by 2x2 means.

    `psnr` compares with the transformed reconstruction. It measures only whether the decoder commutes with the
    transformation, so models of different fidelity can be compared. `to_image` compares with the transformed image, and
    should be read beside the PSNR of the plain reconstruction.

    Source: Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling"
    (2025).
    """
    for name, transform in TRANSFORMS.items():
        decoded = model.decode(transform(of.latents, 1))
        rows, columns = decoded.shape[-2:]
        expected = [transform(x, of.factor)[..., :rows, :columns] for x in (of.reconstruction, of.image)]

        pictures = [_inner(x, of.factor) if name == "shift" else x for x in (decoded, *expected)]
        yield (
            {"transform": name},
            {"psnr": decibels(pictures[0], pictures[1]), "to_image": decibels(pictures[0], pictures[2])},
        )


def _inner(images: Tensor, cell: int) -> Tensor:
    """Cut off a quarter on each side.

    Pixels that were rolled over the border are not where they belong.
    """
    top, left = (side // cell // 4 * cell for side in images.shape[-2:])
    return images[..., top:-top, left:-left]


PROBES = ("latent_noise", "input_noise", "masked", "equivariance", "drift", "tiled")
SMALLEST_TILE = 16  # latent cells
LAYERS = 5  # layers with the largest activations that are reported


@torch.no_grad()
def probe(
    model: EncodesAndDecodes, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Run all probes on images (1, C, H, W) in [-1, 1] of one size, which are on the model's device.

    Returns plain values for JSON. The key of each probe holds a list of what was done, with decibels over the images:
    {"mean" of the finite ones, "identical": how many are without error, "not_finite": how many are NaN}. It holds None
    if the probe does not apply, and `missing` says why. Noise is seeded by the position of the image. `advance` is
    called `probe_steps(images)` times.
    """
    subjects: list[Subject] = []
    for seed, image in enumerate(images):
        subjects.append(_subject(model, image, seed))
        advance()

    # All images get noise of the same strength, relative to the spread of the latents of all of them.
    spread = _spread(subjects)
    tile = _tile(subjects[0])
    probes: dict[str, Callable[[EncodesAndDecodes, Subject], Measured]] = {
        "latent_noise": partial(latent_noise, spread=spread),
        "input_noise": input_noise,
        "masked": masked,
        "equivariance": equivariance,
        "drift": drift,
        "tiled": partial(tiles, tile=tile),
    }

    missing = _not_applicable(subjects[0], tile)
    result: dict[str, Any] = {
        "images": len(images),
        "pixels": list(images[0].shape[-2:]),
        "latent_std": spread if math.isfinite(spread) else None,
        "plain": _over_images([decibels(one.reconstruction, one.image) for one in subjects]),
    }

    for name in PROBES:
        each: list[list[Made]] = []
        for one in subjects:
            each.append([] if name in missing else list(probes[name](model, one)))
            advance()
        result[name] = [_together(same) for same in zip(*each, strict=True)] or None
    return result | {"missing": missing}


def probe_steps(images: Sequence[Tensor]) -> int:
    """Count how often `probe` calls `advance`: for each image once, and once more for every probe."""
    return len(images) * (1 + len(PROBES))


def precision(
    model: base.Autoencoder, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Run `audit_precision` and return plain values for JSON, with None for what is not finite."""
    audit = audit_precision(model, images, advance)
    return {
        "is_safe": audit.is_safe,
        "verdict": audit.verdict,
        "headroom": audit.headroom,
        "psnr": {name: _finite(value) for name, value in audit.psnr.items()},
        "largest": [{"layer": layer, "peak": _finite(peak)} for layer, peak in audit.largest[:LAYERS]],
    }


def _subject(model: EncodesAndDecodes, image: Tensor, seed: int) -> Subject:
    """Encode and decode an image without any disturbance."""
    latents = model.encode(image).mode()
    return Subject(image, latents, model.decode(latents), seed)


def _spread(subjects: Sequence[Subject]) -> float:
    """Compute the standard deviation of all finite latents; NaN if there are none.

    It is one number for all channels, because diffusion models mostly have one scaling factor for all.
    """
    values = torch.cat([one.latents.cpu().double().flatten() for one in subjects])
    finite = values[values.isfinite()]
    return finite.std(correction=0).item() if len(finite) else math.nan


def _tile(first: Subject) -> int:
    """Return the side of a tile in latent cells: half the short side of the latents, at least `SMALLEST_TILE`.

    It is a multiple of 4, so that overlaps are whole cells.
    """
    return max(SMALLEST_TILE, min(first.latents.shape[-2:]) // 8 * 4)


def _not_applicable(first: Subject, tile: int) -> dict[str, str]:
    """Return {probe: why it does not apply to images of this size}."""
    rows, columns = first.latents.shape[-2:]
    said = f"latents are {columns}x{rows} cells"
    missing: dict[str, str] = {}
    if min(rows, columns) < FEWEST_CELLS:
        missing["equivariance"] = f"{said}, it takes {FEWEST_CELLS}x{FEWEST_CELLS}; measure larger images"
    if max(rows, columns) <= tile:
        missing["tiled"] = f"{said}, which is one tile of {tile}x{tile}; measure larger images"
    return missing


def _together(same: Sequence[Made]) -> dict[str, Any]:
    """Combine what one trial of a probe gave for each image."""
    done = same[0][0]
    return done | {name: _over_images([values[name] for _, values in same]) for name in same[0][1]}


def _over_images(values: Sequence[float]) -> dict[str, Any]:
    """Average the finite values, and count those that are infinite or NaN."""
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": math.fsum(finite) / len(finite) if finite else None,
        "identical": sum(value == math.inf for value in values),
        "not_finite": sum(math.isnan(value) for value in values),
    }


def _finite(value: float) -> float | None:
    """Return the value, or None if it is not finite."""
    return value if math.isfinite(value) else None
