"""The pictures of the chosen images and what the page says of them, within so many bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vae.evaluation.report.charts import colour_class
from vae.evaluation.report.drawing import LEAST, Pictures, amplified, as_data, error_gain, latent_map, to_picture
from vae.evaluation.report.gallery import Case, Rankings, Row, main_metrics
from vae.evaluation.report.wording import measured
from vae.metrics.registry import PAIRED

MAPPED = 3  # images whose latents are shown


@dataclass(frozen=True)
class Picture:
    """`key` is its id in the page, `role` what it is of the image, `model` whose."""

    key: str
    role: str
    model: str | None
    colour: str
    data: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """One image on the page. `numbers` by model: each main metric's."""

    dataset: str
    index: int
    image: str
    pictures: list[Picture]
    latents: list[Picture]
    numbers: dict[str, list[str]]

    def of(self, model: str | None, role: str) -> Picture | None:
        return next((one for one in self.pictures if one.model == model and one.role == role), None)


@dataclass(frozen=True)
class Extreme:
    """An image at one end of a metric, as a model reconstructs it; `rank` 1 is the best of `count`."""

    shown: Shown
    model: str
    colour: str
    value: str
    rank: int
    count: int


def show(
    document: dict[str, Any],
    rows: Sequence[Row],
    pictures: Mapping[Case, Pictures],
    cases: Sequence[Case],
    most_bytes: int | None,
) -> tuple[list[Shown], int]:
    """As many of `cases` as `most_bytes` have room for, and the gain of their errors.

    Without `most_bytes` it is what the page says beside the pictures: all the images, and no data.
    """
    models = list(document["models"])
    if most_bytes is not None:
        cases = cases[: max(most_bytes, 0) // (LEAST * (1 + 3 * len(models)))]
    count = sum(1 + (2 + (n < MAPPED)) * len(models) for n in range(len(cases)))
    share = (most_bytes or 0) // max(count, 1)
    gain = error_gain([pictures[case] for case in cases])
    of_cases: dict[Case, dict[str, Row]] = {case: {} for case in cases}
    for row in rows:
        if (row["dataset"], row["index"]) in of_cases:
            of_cases[row["dataset"], row["index"]][row["model"]] = row

    def data(picture: Image.Image) -> str:
        return "" if most_bytes is None else as_data(picture, share)

    names = main_metrics(document)
    shown = []
    for number, case in enumerate(cases):
        of_models = of_cases[case]
        numbers = {model: _numbers(of_models.get(model), names) for model in models}
        image = next(iter(of_models.values()))["image"]
        drawn = _drawn(f"p{number}", pictures[case], models, gain, data)
        maps = _maps(f"z{number}", pictures[case], models, data) if number < MAPPED else []
        shown.append(Shown(*case, image, drawn, maps, numbers))
    return shown, gain


def extremes(
    document: dict[str, Any], ranks: Rankings, shown: Sequence[Shown], dataset: str, metric: str
) -> list[Extreme]:
    """For each model the worst and the best image that there are pictures of."""
    by_index = {one.index: one for one in shown if one.dataset == dataset}
    found = []
    for number, model in enumerate(document["models"]):
        order = ranks[dataset, metric, model]
        drawn = [
            (rank, row)
            for rank, row in enumerate(order, start=1)
            if row["index"] in by_index and by_index[row["index"]].of(model, "reconstruction")
        ]
        for rank, row in _ends(drawn):
            value = f"{PAIRED[metric].title} {measured(metric, row['metrics'][metric])}"
            found.append(Extreme(by_index[row["index"]], model, colour_class(number), value, rank, len(order)))
    return found


def _numbers(row: Row | None, metrics: list[str]) -> list[str]:
    return [measured(metric, row["metrics"].get(metric) if row else None) for metric in metrics]


def _ends(items: list[Any]) -> list[Any]:
    """The last and the first, if they are two."""
    return [items[-1], items[0]] if len(items) > 1 else items


def _drawn(
    key: str, pictures: Pictures, models: list[str], gain: int, data: Callable[[Image.Image], str]
) -> list[Picture]:
    image = to_picture(pictures.image)
    drawn = [Picture(key, "input", None, "", data(image), image.size)]
    for number, model in enumerate(models):
        if (reconstruction := pictures.reconstructions.get(model)) is not None:
            colour = colour_class(number)
            seen = data(to_picture(reconstruction))
            error = data(amplified(pictures.image, reconstruction, gain))
            drawn.append(Picture(f"{key}r{number}", "reconstruction", model, colour, seen, image.size))
            drawn.append(Picture(f"{key}e{number}", "error", model, colour, error, image.size))
    return drawn


def _maps(key: str, pictures: Pictures, models: list[str], data: Callable[[Image.Image], str]) -> list[Picture]:
    maps = []
    for number, model in enumerate(models):
        if (latents := pictures.latents.get(model)) is not None:
            picture = latent_map(latents)
            role = f"{latents.shape[0]} latent channels of {latents.shape[2]}x{latents.shape[1]}"
            maps.append(Picture(f"{key}m{number}", role, model, colour_class(number), data(picture), picture.size))
    return maps
