"""Pictures in the report: images, reconstructions, amplified errors and latent maps, as data of bounded size.

It also prepares what the report shows of models beside their base: a table, and a grid of pictures before and after.
"""

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
SMALLEST = 8  # pixels: no picture is reduced below this
LEAST = 6_000  # bytes: a picture of fewer is not worth showing, so the page shows fewer pictures instead
GAINS = (1, 2, 4, 8, 16, 32)
SPREAD = 2.5  # standard deviations of a latent channel between the middle of the colour scale and its ends
COLD, MIDDLE, WARM = (33, 90, 130), (245, 242, 235), (176, 72, 44)  # sRGB


@dataclass(frozen=True)
class Pictures:
    """What is shown of one image: the image, and by model its reconstruction and its latents.

    The image and its reconstructions are uint8 (C, H, W), and latents are (c, h, w).
    """

    image: Tensor
    reconstructions: dict[str, Tensor]
    latents: dict[str, Tensor] = field(default_factory=dict)


def as_shown(pixels: Tensor) -> Tensor:
    """Turn uint8 (C, H, W) into (3, H, W); of more than four channels the first three are shown."""
    return as_channels(pixels[:3] if len(pixels) > 4 else pixels, 3)


def error_gain(pictures: Sequence[Pictures]) -> int:
    """Return the power of two that makes the largest errors of most pictures nearly white.

    It is the same for all pictures, so that their errors can be compared.
    """
    largest = [
        torch.quantile(_error(shown.image, other).flatten()[:: max(1, other.numel() // 100_000)].float(), 0.99).item()
        for shown in pictures
        for other in shown.reconstructions.values()
    ]
    typical = max(float(np.median(largest)), 1.0) if largest else 1.0
    return max(gain for gain in GAINS if gain == 1 or gain * typical <= 255)


def amplified(image: Tensor, reconstruction: Tensor, gain: int) -> Image.Image:
    """Draw the absolute error of each colour, `gain` times, on black."""
    return to_picture((_error(image, reconstruction) * gain).clamp(max=255).to(torch.uint8))


def to_picture(pixels: Tensor) -> Image.Image:
    """Convert uint8 (C, H, W) to a Pillow image."""
    return Image.fromarray(as_shown(pixels).permute(1, 2, 0).contiguous().cpu().numpy())


def latent_map(latents: Tensor) -> Image.Image:
    """Draw all channels of (c, h, w) side by side, about as wide as high.

    Each channel goes from cold to warm around its own mean.
    """
    values = latents.detach().cpu().double()
    centred = values - values.mean(dim=(1, 2), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    levels = (centred / (SPREAD * deviation)).nan_to_num().clamp(-1.0, 1.0)
    return tiled(coloured(levels.numpy()))


def coloured(levels: np.ndarray) -> np.ndarray:
    """Map [-1, 1] (...) to colours, uint8 (..., 3): cold, neutral at 0, warm."""
    share = np.abs(levels)[..., None]
    ends = np.where(levels[..., None] < 0, np.array(COLD), np.array(WARM))
    return np.rint((1.0 - share) * np.array(MIDDLE) + share * ends).astype(np.uint8)


def tiled(tiles: np.ndarray) -> Image.Image:
    """Arrange tiles, uint8 (count, h, w, 3), in one picture with transparent gaps of at least a pixel."""
    count, height, width, _ = tiles.shape
    columns = columns_of(count)
    gap = max(1, height // 24)
    rows = math.ceil(count / columns)

    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for number, tile in enumerate(tiles):
        top = number // columns * (height + gap)
        left = number % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255

    return Image.fromarray(sheet)


def columns_of(count: int) -> int:
    """Return a divisor of `count` at or above its square root, so that few places stay empty."""
    root = math.ceil(math.sqrt(count))
    return next((columns for columns in range(root, min(2 * root, count) + 1) if count % columns == 0), root)


def as_data(picture: Image.Image, most_bytes: int) -> Markup:
    """Encode a picture as a data URI of at most `most_bytes`.

    It is lossless if there is room, else of lower quality, else smaller. JPEG keeps the colour of every pixel here.
    Lossy WebP keeps one colour for four pixels, which would hide what autoencoders do to colour.
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
    """Yield the encodings worth trying, the best first.

    Lossless encoding is tried if there is room: photographs take about three characters a pixel.
    """
    if picture.mode == "RGBA" or most_bytes > 2.5 * picture.width * picture.height:
        yield "webp", {"lossless": True, "method": 2}
    if picture.mode == "RGB":
        yield from (("jpeg", {"quality": quality, "subsampling": 0}) for quality in QUALITIES)


def _error(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the absolute error as it is seen, int32 (3, H, W)."""
    return (as_shown(image).int() - as_shown(reconstruction).int()).abs()


IMAGES, WIDTH = 4, 2048  # at most, in the grid; a single image may be wider


@dataclass(frozen=True)
class Against:
    """One model against the base.

    `latents` says what became of the latents, `tables` is {data set: a line for each metric}, and `float16` is what
    float16 does to the base and to the model.
    """

    model: str
    latents: str
    fits: bool
    tables: dict[str, list[Line]]
    float16: tuple[str, str]


def against_base(document: dict[str, Any]) -> list[Against]:
    """Return what is shown of each model against the base; empty if there is no base."""
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
    """Draw the first of `pictures`: inputs, then each model's reconstructions and errors, those of the base first.

    Returns None if there is no base, or no image that all models reconstructed.
    """
    models = whole_models(document)
    known = [one for one in pictures.values() if one.reconstructions.keys() >= set(models)]
    if document.get("base") is None or not known:
        return None
    chosen = known[: max(1, min(IMAGES, WIDTH // known[0].image.shape[-1]))]
    made = {short(model): torch.stack([one.reconstructions[model] for one in chosen]) for model in models}
    return reconstruction_sheet(torch.stack([one.image for one in chosen]), made)


def _float16(document: dict[str, Any], model: str) -> str:
    """Say whether a model is safe in float16."""
    known = (document.get("precision") or {}).get(model)
    if known is None:
        return "not measured"
    return "safe" if known["is_safe"] else "not safe"
