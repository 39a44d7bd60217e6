"""How an autoencoder bears noise, missing pixels, transformed latents, repetition, tiles and half precision."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vae.audit.precision import audit_precision
from vae.evaluation.equivariance import FEWEST_CELLS, equivariance
from vae.evaluation.probes import (
    Autoencoder,
    Made,
    Measured,
    Subject,
    decibels,
    drift,
    input_noise,
    latent_noise,
    masked,
    tiles,
)
from vae.models import interface

PROBES = ("latent_noise", "input_noise", "masked", "equivariance", "drift", "tiled")
SMALLEST_TILE = 16  # latent cells
LAYERS = 5  # of the largest activations


@torch.no_grad()
def probe(model: Autoencoder, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None) -> dict[str, Any]:
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
    probes: dict[str, Callable[[Autoencoder, Subject], Measured]] = {
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
    model: interface.Autoencoder, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
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


def _subject(model: Autoencoder, image: Tensor, seed: int) -> Subject:
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
