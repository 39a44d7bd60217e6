"""`render`: the document, the rows and the pictures of an evaluation as one HTML file that needs nothing else."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vae.evaluation.report.before_after import against_base, grid
from vae.evaluation.report.charts import colour_class
from vae.evaluation.report.drawing import Pictures, as_data
from vae.evaluation.report.findings import cautions, findings
from vae.evaluation.report.gallery import Case, Rankings, Row, main_metrics, of_whole_models, rankings, telling
from vae.evaluation.report.inside import latent_section
from vae.evaluation.report.shown import Shown, extremes, show
from vae.evaluation.report.tables import distributions, matrices, summary
from vae.evaluation.report.trials import robustness_section
from vae.evaluation.report.wording import harmless, short, significant
from vae.metrics.registry import PAIRED

TEMPLATES = Path(__file__).parent / "templates"
NAMED = 200  # images of each list at the end; all are in metrics.json
FILLED = 0.98  # of the bytes that are left, by pictures
OF_GRID = 0.2  # of all bytes, at most


def render(
    document: dict[str, Any],
    rows: Sequence[Row],
    pictures: Mapping[Case, Pictures],
    most_bytes: int = 10_000_000,
) -> str:
    """The page, of at most `most_bytes` in UTF-8 as far as that depends on pictures; the same every time."""
    crossed, document = document, of_whole_models(document)
    rows = [row for row in rows if row["model"] in document["models"]]
    ranks = rankings(document, rows)
    cases = [case for case in telling(document, rows, ranks) if case in pictures]
    sheet = grid(document, pictures)
    sections = _sections(document, rows, crossed)
    sections["sheet"] = None if sheet is None else (as_data(sheet, int(OF_GRID * most_bytes)), sheet.size)
    bare = _filled(document, ranks, sections, *show(document, rows, pictures, cases, None))
    left = int(FILLED * (most_bytes - len(bare.encode())))
    return _filled(document, ranks, sections, *show(document, rows, pictures, cases, left))


def _sections(document: dict[str, Any], rows: Sequence[Row], crossed: dict[str, Any]) -> dict[str, Any]:
    """All but the pictures."""
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
    """Nothing is loaded from anywhere; this very style sheet and this very script are used, no other."""
    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    """Whatever is written into the page is made harmless, then escaped."""
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
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _for_script(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """What the viewer needs of each image; the pictures themselves are found by their keys."""
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
