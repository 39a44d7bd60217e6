"""The section about robustness: what is left of an image when latents, pixels or the coding are disturbed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vae.evaluation.report.charts import Point, lines
from vae.evaluation.report.wording import NOTHING, counted, figure, short
from vae.evaluation.robustness import PROBES

NOT_FINITE = "not finite"
Trial = dict[str, Any]  # what was done, and {name: decibels over the images}

TRANSFORMS = {
    "shift": "shifted by one cell",
    "flip": "mirrored",
    "rotation": "turned by 90°",
    "scale": "halved",
}


@dataclass(frozen=True)
class Group:
    """Trials of one kind: (what was done, decibels of each of the models)."""

    title: str
    meaning: str
    lines: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Curve:
    title: str
    meaning: str
    chart: Markup


@dataclass(frozen=True)
class Robustness:
    models: list[str]
    images: int
    curves: list[Curve]
    groups: list[Group]
    missing: list[str]


def robustness_section(document: dict[str, Any]) -> Robustness | None:
    every = list(document["models"])
    of_models = document.get("robustness") or {}
    known = {model: of_models[model] for model in every if of_models.get(model)}
    if not known:
        return None
    curves = [
        Curve(title, meaning, lines(series, across, "PSNR in dB", title))
        for title, meaning, across, points in CURVES
        if any(series := [points(known[model]) if model in known else [] for model in every])
    ]
    missing = dict.fromkeys(
        f"{probe.replace('_', ' ')}: not measured, {reason}"
        for one in known.values()
        for probe, reason in (one.get("missing") or {}).items()
    )
    broken = [
        f"{short(model)}: {count} of {counted(one['images'], 'image')} not finite by {probe}, and not in its means"
        for model, one in known.items()
        for probe, count in not_finite(one).items()
    ]
    precision = document.get("precision") or {}
    groups = [*_groups(list(known.values())), *_formats([precision.get(model) or {} for model in known])]
    return Robustness(list(known), max(one["images"] for one in known.values()), curves, groups, [*broken, *missing])


def not_finite(one: dict[str, Any]) -> dict[str, int]:
    """{probe in words: how many images it makes come out as what is not a number}, at most by any trial of it."""
    trials = {"plain": [{"psnr": one["plain"]}]} | {name: one.get(name) or [] for name in PROBES}
    found: dict[str, int] = {}
    for name, done in trials.items():
        counts = [value["not_finite"] for trial in done for value in trial.values() if isinstance(value, dict)]
        if any(counts):
            found["coding alone" if name == "plain" else name.replace("_", " ")] = max(counts)
    return found


def _noisy(one: dict[str, Any]) -> list[Point]:
    return _points([{"noise": 0.0, "psnr": one["plain"]}, *(one.get("latent_noise") or [])], "noise")


def _drifted(one: dict[str, Any]) -> list[Point]:
    return _points(one.get("drift") or [], "round")


CURVES: list[tuple[str, str, str, Callable[[dict[str, Any]], list[Point]]]] = [
    (
        "Noise on the latents",
        "As a diffusion model's errors would be: the flatter, the more of them the decoder forgives.",
        "noise in standard deviations of the latents",
        _noisy,
    ),
    (
        "Again and again",
        "Coded once, twice, to ten times, as when somebody edits, saves and edits.",
        "round trips",
        _drifted,
    ),
]


def _groups(models: list[dict[str, Any]]) -> Iterator[Group]:
    kinds = [
        (
            "input_noise",
            "Noise on the pixels",
            "the noisy image → what coding makes of it",
            _noise_words,
            ("input", "psnr"),
        ),
        (
            "masked",
            "Missing pixels",
            "set to grey; those pixels alone, before → after coding",
            _mask_words,
            ("input_masked", "psnr_masked"),
        ),
        (
            "equivariance",
            "Transformed latents",
            "decoded, against the reconstruction transformed likewise",
            lambda trial: TRANSFORMS.get(trial["transform"], trial["transform"]),
            ("psnr",),
        ),
    ]
    for key, title, meaning, words, names in kinds:
        if found := _table([one.get(key) or [] for one in models], words, names):
            yield Group(title, meaning, found)
    tiled = [one.get("tiled") or [] for one in models]
    rows = [
        *_table(tiled, lambda trial: f"decoded in tiles of {trial['tile']} pixels", ("decoded",)),
        *_table(
            tiled, lambda trial: f"encoded and decoded in tiles of {trial['tile']} pixels", ("encoded_and_decoded",)
        ),
    ]
    if rows:
        yield Group("Tiles", "against the whole image at once", rows)


def _formats(models: list[dict[str, Any]]) -> Iterator[Group]:
    formats = dict.fromkeys(name for one in models for name in one.get("psnr") or {})
    if formats:
        rows = [(name, [_in_format(one.get("psnr") or {}, name) for one in models]) for name in formats]
        yield Group("Half precision", "against float32", rows)


def _table(
    models: list[list[Trial]], words: Callable[[Trial], str], names: tuple[str, ...]
) -> list[tuple[str, list[str]]]:
    """A line for each thing that was done to any of the models."""
    done = dict.fromkeys(words(trial) for trials in models for trial in trials)
    cells = [
        {words(trial): " → ".join(_decibels(trial.get(name)) for name in names) for trial in trials}
        for trials in models
    ]
    return [(what, [cell.get(what, NOTHING) for cell in cells]) for what in done]


def _noise_words(trial: Trial) -> str:
    return f"{trial['levels']} grey levels"


def _mask_words(trial: Trial) -> str:
    where = "at random" if trial["mask"] == "random" else f"in a {trial['mask']}"
    return f"{trial['share']:.0%} {where}"


def _points(trials: list[Trial], across: str) -> list[Point]:
    values = [(float(trial[across]), trial["psnr"]["mean"]) for trial in trials]
    return [(x, y) for x, y in values if y is not None]


def _in_format(psnr: dict[str, float | None], name: str) -> str:
    """A number is absent where the format was not tried, and null where an image came out as what is not one."""
    if name not in psnr:
        return NOTHING
    value = psnr[name]
    return NOT_FINITE if value is None else figure(value, 1)


def _decibels(over_images: dict[str, Any] | None) -> str:
    """Over the images of a trial, those that are not finite counted beside it."""
    if over_images is None:
        return NOTHING
    mean, broken = over_images["mean"], over_images.get("not_finite", 0)
    if mean is None and over_images.get("identical"):
        known = "identical"
    elif mean is None and broken:
        return NOT_FINITE
    else:
        known = figure(mean, 1)
    return f"{known} ({broken} {NOT_FINITE})" if broken else known
