"""Models beside the base that they came from: the table of a page, and a grid of pictures before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vae.data.pictures import reconstruction_sheet
from vae.evaluation.base import Line, lines_against_base, unfit
from vae.evaluation.recorded import whole_models
from vae.evaluation.report.drawing import Pictures
from vae.evaluation.report.gallery import Case
from vae.evaluation.report.wording import short

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
