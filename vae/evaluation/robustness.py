"""What becomes of one image when its latents or pixels are disturbed, or the way it is coded.

Probes yield what was done and decibels between images as they are shown, rounded to uint8: infinite where the two are
identical, NaN where one is not finite.


Images too large for memory are coded in overlapping tiles, blended linearly, as diffusers' `enable_tiling` does.

`AutoencoderKL.tiled_encode` and `tiled_decode` of diffusers.


Does the decoder commute with shifts, flips, rotations and scales of its latents?

Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling" (2025).


How an autoencoder bears noise, missing pixels, transformed latents, repetition, tiles and half precision."""

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

LATENT_NOISE = (0.1, 0.3, 0.5, 1.0)  # of the latents' standard deviation
INPUT_NOISE = (10, 25)  # standard deviation in grey levels of 255
MASKS = (("random", 0.25), ("random", 0.5), ("block", 0.25))  # shape, share of the pixels
ROUNDS = 10

Made = tuple[dict[str, Any], dict[str, float]]  # what was done, decibels by name
Measured = Iterator[Made]


class EncodesAndDecodes(Protocol):
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


def coded(model: EncodesAndDecodes, image: Tensor) -> Tensor:
    return model.decode(model.encode(image).mode())


def latent_noise(model: EncodesAndDecodes, of: Subject, spread: float) -> Measured:
    """Gaussian noise on the latents, in shares of their standard deviation `spread`."""
    noise = of.noise(of.latents)
    for share in LATENT_NOISE:
        disturbed = model.decode(of.latents + share * spread * noise)
        yield {"noise": share}, {"psnr": decibels(disturbed, of.image)}


def input_noise(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Gaussian noise on the pixels, clamped: `input` is the noisy image, `psnr` what coding makes of it."""
    noise = of.noise(of.image)
    for levels in INPUT_NOISE:
        noisy = (of.image + levels / 127.5 * noise).clamp(-1.0, 1.0)
        yield {"levels": levels}, {"input": decibels(noisy, of.image), "psnr": decibels(coded(model, noisy), of.image)}


def masked(model: EncodesAndDecodes, of: Subject) -> Measured:
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


def drift(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Coded again and again, each time from the rounded image: as when somebody edits, saves and edits."""
    image = of.reconstruction
    for count in range(1, ROUNDS + 1):
        if count > 1 and image.isfinite().all():
            image = coded(model, to_model_range(to_uint8(image)))
        yield {"round": count}, {"psnr": decibels(image, of.image)}


def tiles(model: EncodesAndDecodes, of: Subject, tile: int) -> Measured:
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


OVERLAP = 0.25  # of a tile


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, made: int) -> Tensor:
    """`function` on squares of x (B, C, H, W) with sides `tile`, which it makes `made`; both multiples of 4."""
    assert tile % 4 == made % 4 == 0
    step, blend = int(tile * (1 - OVERLAP)), int(made * OVERLAP)
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
    """`after`, its first `most` rows or columns fading in from the last of `before`, where both have as many."""
    extent = min(before.shape[dim], after.shape[dim], most)
    shares = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    shares = shares.view([-1, 1] if dim == -2 else [1, -1])
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new, rest = after.split([extent, after.shape[dim] - extent], dim=dim)
    return torch.cat([old * (1 - shares) + new * shares, rest], dim=dim)


FEWEST_CELLS = 4  # each way, for an inner half to be left

TRANSFORMS: Mapping[str, Callable[[Tensor, int], Tensor]] = {  # of x, and the pixels in it of one latent cell
    "shift": lambda x, cell: x.roll((cell, cell), dims=(-2, -1)),
    "flip": lambda x, _: x.flip(-1),
    "rotation": lambda x, _: x.rot90(1, (-2, -1)),
    "scale": lambda x, _: F.avg_pool2d(x, 2),
}


def equivariance(model: EncodesAndDecodes, of: Subject) -> Measured:
    """Decoded from latents that were shifted by one cell, mirrored, turned by 90 degrees, or halved by 2x2 means.

    `psnr` is against the transformed reconstruction: the error of commuting alone, so that models of different fidelity
    can be compared. `to_image` is against the transformed image, beside which the plain reconstruction's is to be read.
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
    """Without a quarter on each side, since what was rolled over the border does not belong where it is."""
    top, left = (side // cell // 4 * cell for side in images.shape[-2:])
    return images[..., top:-top, left:-left]


PROBES = ("latent_noise", "input_noise", "masked", "equivariance", "drift", "tiled")
SMALLEST_TILE = 16  # latent cells
LAYERS = 5  # of the largest activations


@torch.no_grad()
def probe(
    model: EncodesAndDecodes, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Of images (1, C, H, W) in [-1, 1] of one size, on the model's device: plain numbers for JSON.

    Under the name of each probe is a list of what was done, with decibels over the images: {"mean" of the finite ones,
    "identical": how many have no error, "not_finite": how many are NaN}. Where a probe does not apply there is None,
    and `missing` says why. Noise is seeded by the position of the image; `advance` is called `probe_steps(images)`
    times.
    """
    subjects: list[Subject] = []
    for seed, image in enumerate(images):
        subjects.append(_subject(model, image, seed))
        advance()
    spread, tile = _spread(subjects), _tile(subjects[0])
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
    """How often `probe` calls `advance`: for each image once plain and once for every probe."""
    return len(images) * (1 + len(PROBES))


def precision(
    model: base.Autoencoder, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """`audit_precision` as plain numbers for JSON; what is not finite is None."""
    audit = audit_precision(model, images, advance)
    return {
        "is_safe": audit.is_safe,
        "verdict": audit.verdict,
        "headroom": audit.headroom,
        "psnr": {name: _finite(value) for name, value in audit.psnr.items()},
        "largest": [{"layer": layer, "peak": _finite(peak)} for layer, peak in audit.largest[:LAYERS]],
    }


def _subject(model: EncodesAndDecodes, image: Tensor, seed: int) -> Subject:
    latents = model.encode(image).mode()
    return Subject(image, latents, model.decode(latents), seed)


def _spread(subjects: Sequence[Subject]) -> float:
    """The standard deviation over all channels, since a diffusion model mostly has one scaling factor for all."""
    values = torch.cat([one.latents.cpu().double().flatten() for one in subjects])
    finite = values[values.isfinite()]
    return finite.std(correction=0).item() if len(finite) else math.nan


def _tile(first: Subject) -> int:
    """Half the short side, in latent cells; a multiple of 4, so that overlaps are whole cells."""
    return max(SMALLEST_TILE, min(first.latents.shape[-2:]) // 8 * 4)


def _not_applicable(first: Subject, tile: int) -> dict[str, str]:
    """{probe: why}"""
    rows, columns = first.latents.shape[-2:]
    said = f"latents are {columns}x{rows} cells"
    missing: dict[str, str] = {}
    if min(rows, columns) < FEWEST_CELLS:
        missing["equivariance"] = f"{said}, it takes {FEWEST_CELLS}x{FEWEST_CELLS}; measure larger images"
    if max(rows, columns) <= tile:
        missing["tiled"] = f"{said}, which is one tile of {tile}x{tile}; measure larger images"
    return missing


def _together(same: Sequence[Made]) -> dict[str, Any]:
    """One probe of every image."""
    done = same[0][0]
    return done | {name: _over_images([values[name] for _, values in same]) for name in same[0][1]}


def _over_images(values: Sequence[float]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": math.fsum(finite) / len(finite) if finite else None,
        "identical": sum(value == math.inf for value in values),
        "not_finite": sum(math.isnan(value) for value in values),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
