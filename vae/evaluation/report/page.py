"""The page of the report: one self-contained HTML file, made from an evaluation's document, rows and pictures.

`render` writes it. The page has a limit of bytes: pictures are chosen and compressed to fit what the text leaves of it.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vae.evaluation.report.charts import colour_class
from vae.evaluation.report.findings import cautions, findings
from vae.evaluation.report.gallery import (
    Case,
    Rankings,
    Row,
    harmless,
    main_metrics,
    measured,
    of_whole_models,
    rankings,
    short,
    significant,
    telling,
)
from vae.evaluation.report.images import (
    LEAST,
    Pictures,
    against_base,
    amplified,
    as_data,
    error_gain,
    latent_map,
    to_picture,
)
from vae.evaluation.report.sections import distributions, latent_section, matrices, robustness_section, summary
from vae.metrics.registry import PAIRED

MAPPED = 3  # the number of images whose latents are shown


@dataclass(frozen=True)
class Picture:
    """One picture on the page: `key` is its id there, `role` says what it shows, and `model` whose it is."""

    key: str
    role: str
    model: str | None
    colour: str
    data: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """One image on the page; `numbers` has by model the values of the main metrics."""

    dataset: str
    index: int
    image: str
    pictures: list[Picture]
    latents: list[Picture]
    numbers: dict[str, list[str]]

    def of(self, model: str | None, role: str) -> Picture | None:
        """Return the picture of a model in a role, or None."""
        return next((one for one in self.pictures if one.model == model and one.role == role), None)


@dataclass(frozen=True)
class Extreme:
    """An image at one end of a metric, as a model reconstructs it; rank 1 is the best of `count`."""

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
    """Prepare as many of `cases` as fit into `most_bytes`, and return them with the gain of their errors.

    If `most_bytes` is None, all images are prepared without the data of their pictures. The length of that page is what
    the text takes.
    """
    models = list(document["models"])
    if most_bytes is not None:
        cases = cases[: max(most_bytes, 0) // (LEAST * (1 + 3 * len(models)))]

    # Every picture gets an equal share: the input, then two for each model, and a latent map for the first images.
    count = sum(1 + (2 + (n < MAPPED)) * len(models) for n in range(len(cases)))
    share = (most_bytes or 0) // max(count, 1)

    gain = error_gain([pictures[case] for case in cases])

    of_cases: dict[Case, dict[str, Row]] = {case: {} for case in cases}
    for row in rows:
        if (row["dataset"], row["index"]) in of_cases:
            of_cases[row["dataset"], row["index"]][row["model"]] = row

    def data(picture: Image.Image) -> str:
        """Return the picture as a data URI of its share, or nothing."""
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
    """Return for each model its worst and its best image, among the images that are shown."""
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
    """Format the value of each metric."""
    return [measured(metric, row["metrics"].get(metric) if row else None) for metric in metrics]


def _ends(items: list[Any]) -> list[Any]:
    """Return the last and the first item, or all if there are fewer than two."""
    return [items[-1], items[0]] if len(items) > 1 else items


def _drawn(
    key: str, pictures: Pictures, models: list[str], gain: int, data: Callable[[Image.Image], str]
) -> list[Picture]:
    """Draw an image, its reconstructions and their errors."""
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
    """Draw the latents of each model."""
    maps = []
    for number, model in enumerate(models):
        if (latents := pictures.latents.get(model)) is not None:
            picture = latent_map(latents)
            role = f"{latents.shape[0]} latent channels of {latents.shape[2]}x{latents.shape[1]}"
            maps.append(Picture(f"{key}m{number}", role, model, colour_class(number), data(picture), picture.size))
    return maps


TEMPLATES = Path(__file__).parent / "templates"
NAMED = 200  # the most images in each list at the end; all are in metrics.json
FILLED = 0.98  # pictures may take this share of the bytes that the text leaves
OF_GRID = 0.2  # the grid may take this share of all bytes


def render(
    document: dict[str, Any],
    rows: Sequence[Row],
    pictures: Mapping[Case, Pictures],
    sheet: Image.Image | None = None,
    most_bytes: int = 10_000_000,
) -> str:
    """Write the page; the result depends on nothing but the arguments.

    `sheet` shows images before and after. The page has at most `most_bytes` in UTF-8, as far as that can be reached
    with fewer or smaller pictures.
    """
    crossed, document = document, of_whole_models(document)

    rows = [row for row in rows if row["model"] in document["models"]]
    ranks = rankings(document, rows)
    cases = [case for case in telling(document, rows, ranks) if case in pictures]

    sections = _sections(document, rows, crossed)
    sections["sheet"] = None if sheet is None else (as_data(sheet, int(OF_GRID * most_bytes)), sheet.size)

    # The page is made twice: without pictures to know the bytes that they may take, then with them.
    bare = _filled(document, ranks, sections, *show(document, rows, pictures, cases, None))
    left = int(FILLED * (most_bytes - len(bare.encode())))
    return _filled(document, ranks, sections, *show(document, rows, pictures, cases, left))


def _sections(document: dict[str, Any], rows: Sequence[Row], crossed: dict[str, Any]) -> dict[str, Any]:
    """Make everything on the page but the pictures."""
    datasets = list(document["datasets"])
    return {
        "findings": findings(document),
        "cautions": cautions(document),
        "summaries": {name: summary(document, name) for name in datasets},
        "distributions": {name: distributions(document, rows, name) for name in datasets},
        "matrices": {name: matrices(crossed, name) for name in datasets},
        "latents": {name: latent_section(document, name) for name in datasets},
        "robustness": robustness_section(document),
        "against": against_base(document),
    }


def _filled(document: dict[str, Any], ranks: Rankings, sections: dict[str, Any], shown: list[Shown], gain: int) -> str:
    """Fill in the template."""
    metrics = main_metrics(document)
    ends = {
        dataset: [
            (PAIRED[metric], found)
            for metric in metrics
            if (found := extremes(document, ranks, shown, dataset, metric))
        ]
        for dataset in document["datasets"]
    }

    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))

    return (
        _environment()
        .get_template("page.html")
        .render(
            sections,
            document=document,
            colours={model: colour_class(number) for number, model in enumerate(document["models"])},
            titles={name: metric.title for name, metric in PAIRED.items()},
            main=[PAIRED[metric] for metric in metrics],
            shown=shown,
            viewer=_for_script(shown),
            gain=gain,
            extremes=ends,
            named=NAMED,
            style=style,
            script=script,
            policy=Markup(policy(style, script)),
        )
    )


def policy(style: str, script: str) -> str:
    """Return the content security policy: nothing is loaded from anywhere.

    Only this style sheet and this script may be used, which is ensured by their hashes.
    """
    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )


def _hash(text: str) -> str:
    """Hash a text in the form that a content security policy uses."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    """Set up Jinja. Everything that is written into the page is made harmless, then escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": significant, "short": short}
    return environment


def _finalized(value: Any) -> Any:
    """Make text harmless, but leave markup as it is."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _for_script(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return what the viewer needs of each image; it finds the pictures themselves by their keys."""
    return [
        {
            "name": harmless(short(one.image)),
            "dataset": harmless(short(one.dataset)),
            "pictures": [
                {"key": p.key, "label": p.role if p.model is None else f"{harmless(short(p.model))}: {p.role}"}
                for p in one.pictures
            ],
            "numbers": [[harmless(short(model)), *numbers] for model, numbers in one.numbers.items()],
        }
        for one in shown
    ]
