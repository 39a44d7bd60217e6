"""Pictures inside the page: images, reconstructions, amplified errors and latent maps, as data of bounded size.

Models beside the base that they came from: the table of a page, and a grid of pictures before and after."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from vae.data.contact_sheet import reconstruction_sheet
from vae.data.pixels import as_channels
from vae.evaluation.compare import whole_models
from vae.evaluation.drop_in import Line, lines_against_base, unfit
from vae.evaluation.report.gallery import Case, short

QUALITIES = (95, 90, 80, 65, 45)
SMALLEST = 8  # pixels that a picture is never reduced below
LEAST = 6_000  # bytes below which a picture is not worth showing: rather fewer of them
GAINS = (1, 2, 4, 8, 16, 32)
SPREAD = 2.5  # standard deviations of a latent channel from the middle of the scale to its ends
COLD, MIDDLE, WARM = (33, 90, 130), (245, 242, 235), (176, 72, 44)  # sRGB


@dataclass(frozen=True)
class Pictures:
    """What is shown of one image: uint8 (C, H, W), by model the same of its reconstruction, and latents (c, h, w)."""

    image: Tensor
    reconstructions: dict[str, Tensor]
    latents: dict[str, Tensor] = field(default_factory=dict)


def as_shown(pixels: Tensor) -> Tensor:
    """uint8 (C, H, W) -> (3, H, W): of more than four channels the first three."""
    return as_channels(pixels[:3] if len(pixels) > 4 else pixels, 3)


def error_gain(pictures: Sequence[Pictures]) -> int:
    """The power of two that brings the largest errors of most pictures near to white; one for all of them."""
    largest = [
        torch.quantile(_error(shown.image, other).flatten()[:: max(1, other.numel() // 100_000)].float(), 0.99).item()
        for shown in pictures
        for other in shown.reconstructions.values()
    ]
    typical = max(float(np.median(largest)), 1.0) if largest else 1.0
    return max(gain for gain in GAINS if gain == 1 or gain * typical <= 255)


def amplified(image: Tensor, reconstruction: Tensor, gain: int) -> Image.Image:
    """The absolute error of each colour, `gain` times, on black."""
    return to_picture((_error(image, reconstruction) * gain).clamp(max=255).to(torch.uint8))


def to_picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(as_shown(pixels).permute(1, 2, 0).contiguous().cpu().numpy())


def latent_map(latents: Tensor) -> Image.Image:
    """All channels of (c, h, w) side by side, about as wide as high; each from cold to warm around its own mean."""
    values = latents.detach().cpu().double()
    centred = values - values.mean(dim=(1, 2), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    levels = (centred / (SPREAD * deviation)).nan_to_num().clamp(-1.0, 1.0)
    return tiled(coloured(levels.numpy()))


def coloured(levels: np.ndarray) -> np.ndarray:
    """[-1, 1] (...) -> uint8 (..., 3): cold, neutral at 0, warm."""
    share = np.abs(levels)[..., None]
    ends = np.where(levels[..., None] < 0, np.array(COLD), np.array(WARM))
    return np.rint((1.0 - share) * np.array(MIDDLE) + share * ends).astype(np.uint8)


def tiled(tiles: np.ndarray) -> Image.Image:
    """uint8 (count, h, w, 3) -> one picture, a clear pixel or more between them."""
    count, height, width, _ = tiles.shape
    columns = columns_of(count)
    gap = max(1, height // 24)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(sheet)


def columns_of(count: int) -> int:
    """A divisor of `count` near its square root from above, so that few places stay empty."""
    root = math.ceil(math.sqrt(count))
    return next((columns for columns in range(root, min(2 * root, count) + 1) if count % columns == 0), root)


def as_data(picture: Image.Image, most_bytes: int) -> Markup:
    """A data URI of at most `most_bytes`: without loss if there is room, else of lower quality, else smaller.

    JPEG has a colour for each pixel here; lossy WebP has one for four, which would hide what autoencoders do to colour.
    """
    while True:
        for kind, options in _ladder(picture, most_bytes):
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
            if len(uri) <= most_bytes or max(picture.size) <= SMALLEST:
                return Markup(uri)
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.BOX)


def _ladder(picture: Image.Image, most_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is worth trying: photographs take about three characters a pixel without loss."""
    if picture.mode == "RGBA" or most_bytes > 2.5 * picture.width * picture.height:
        yield "webp", {"lossless": True, "method": 2}
    if picture.mode == "RGB":
        yield from (("jpeg", {"quality": quality, "subsampling": 0}) for quality in QUALITIES)


def _error(image: Tensor, reconstruction: Tensor) -> Tensor:
    """int32 (C, H, W) of what is seen."""
    return (as_shown(image).int() - as_shown(reconstruction).int()).abs()


IMAGES, WIDTH = 4, 2048  # of the grid at most; one image is wider where it must be


@dataclass(frozen=True)
class Against:
    """One model: what became of the latents, {data set: a line for each metric}, what float16 does to both."""

    model: str
    latents: str
    fits: bool
    tables: dict[str, list[Line]]
    float16: tuple[str, str]


def against_base(document: dict[str, Any]) -> list[Against]:
    """None where there is no base."""
    return [
        Against(
            model,
            verdict["latents"]["verdict"],
            not unfit(verdict["latents"]),
            {dataset: lines_against_base(document, dataset, model) for dataset in document["datasets"]},
            (_float16(document, document["base"]), _float16(document, model)),
        )
        for model, verdict in (document.get("against_base") or {}).items()
    ]


def grid(document: dict[str, Any], pictures: Mapping[Case, Pictures]) -> Image.Image | None:
    """The first of `pictures`: inputs, then each model's reconstructions and errors, the base's before the others'."""
    models = whole_models(document)
    known = [one for one in pictures.values() if one.reconstructions.keys() >= set(models)]
    if document.get("base") is None or not known:
        return None
    chosen = known[: max(1, min(IMAGES, WIDTH // known[0].image.shape[-1]))]
    made = {short(model): torch.stack([one.reconstructions[model] for one in chosen]) for model in models}
    return reconstruction_sheet(torch.stack([one.image for one in chosen]), made)


def _float16(document: dict[str, Any], model: str) -> str:
    known = (document.get("precision") or {}).get(model)
    return "not measured" if known is None else "safe" if known["is_safe"] else "not safe"
