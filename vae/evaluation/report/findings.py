"""Findings: what the numbers say, in sentences.

They come first on the page. They say which model is better, what a viewer would notice, and what failed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vae.evaluation.report.gallery import counted, figure, listed, main_metrics, not_finite, short
from vae.evaluation.results import SKIPPED
from vae.evaluation.statistics import Comparison, percent
from vae.metrics.registry import PAIRED, VISIBLE

NEAR = {"contrast": 0.05, "saturation": 0.05, "sharpness": 0.1}  # distances from 1 that one would overlook
BELOW = {"contrast": "foggy", "saturation": "washed out", "sharpness": "blurred"}
ABOVE = {"contrast": "harsh", "saturation": "oversaturated", "sharpness": "oversharpened"}
RELIABLE = 10_000  # images: with fewer, an rFID is mostly the bias of a small sample


@dataclass(frozen=True)
class Finding:
    """One sentence with its details; `kind` is "good", "bad" or "plain"."""

    kind: str
    headline: str
    detail: str = ""


def findings(document: dict[str, Any]) -> list[Finding]:
    """Return the findings of an evaluation, the verdict against the base first."""
    found = [finding for dataset in document["datasets"] for finding in _of_dataset(document, dataset)]
    failed = (document.get("gates") or {}).get("failed") or []
    told = "; ".join(_with_short_names(document, sentence) for sentence in failed)
    gates = [Finding("bad", f"{counted(len(failed), 'gate')} failed.", told)] if failed else []
    bears = _disturbed(document.get("robustness") or {})
    return [*_against_base(document), *gates, *found, *bears, *_precision(document.get("precision") or {})]


def _with_short_names(document: dict[str, Any], sentence: str) -> str:
    """Shorten the names of models and data sets in a sentence, and nothing else of it."""
    for name in sorted([*document["models"], *document["datasets"]], key=len, reverse=True):
        sentence = sentence.replace(name, short(name))
    return sentence


def _against_base(document: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether each model can replace the base."""
    for verdict in (document.get("against_base") or {}).values():
        kind = {True: "good", False: "bad", None: "plain"}[verdict["is_harmless"]]
        yield Finding(kind, f"{short(verdict['headline'])}.", _sentence("; ".join(verdict["reasons"])))


def winner(row: dict[str, Any]) -> str | None:
    """Return the model that a comparison shows to be better, or None."""
    compared = Comparison.of_row(row)
    return {1: compared.second, -1: compared.first}.get(compared.sign)


def best(document: dict[str, Any], dataset: str, metric: str) -> str | None:
    """Return the model that is shown to be better than each of the others in a metric, or None."""
    models = list(document["models"])
    beaten: dict[str, int] = dict.fromkeys(models, 0)
    for comparison in document["comparisons"].get(dataset, []):
        if comparison["metric"] == metric and (better := winner(comparison)) is not None:
            beaten[better] += 1
    return next((model for model in models if len(models) > 1 and beaten[model] == len(models) - 1), None)


def _of_dataset(document: dict[str, Any], dataset: str) -> Iterator[Finding]:
    """Yield the findings on one data set."""
    where = f" on {short(dataset)}" if len(document["datasets"]) > 1 else ""
    is_pair = document.get("base") is not None and len(document["models"]) == 2  # `_against_base` has said it
    if len(document["models"]) > 1 and not is_pair:
        yield _ranking(document, dataset, where)
    elif not is_pair:
        yield _means(document, dataset, where)
    for model in document["models"]:
        yield from _appearance(document["metrics"].get(dataset, {}).get(model, {}), short(model), where)
        latents = document.get("latents", {}).get(dataset, {}).get(model) or {}
        yield from (Finding("bad", f"{short(model)}: {warning}.") for warning in latents.get("warnings") or ())

    about = document["datasets"][dataset]
    lost = len(about[SKIPPED]) + len(about["not_finite"])
    if lost:
        yield Finding("bad", f"{counted(lost, 'image')}{where} could not be measured.", "Named at the end.")


def _means(document: dict[str, Any], dataset: str, where: str) -> Finding:
    """List the mean values of the main metrics of a single model."""
    model = next(iter(document["models"]))
    metrics = document["metrics"].get(dataset, {}).get(model, {})
    known = [(PAIRED[name], one["mean"]) for name in main_metrics(document) if (one := metrics.get(name))]
    means = [f"{about.title} {figure(mean, about.digits)} {about.unit}".rstrip() for about, mean in known]
    count = counted(document["datasets"][dataset]["images"], "image")
    return Finding("plain", f"{short(model)} reconstructs {count}{where}.", listed(means))


def _ranking(document: dict[str, Any], dataset: str, where: str) -> Finding:
    """Say which model is best in which of the main metrics."""
    metrics = main_metrics(document)
    shown = {metric: better for metric in metrics if (better := best(document, dataset, metric)) is not None}

    open_ = [PAIRED[metric].title for metric in metrics if metric not in shown]
    unclear = f"No difference shown in {listed(open_)}." if open_ else ""

    if not shown:
        count = document["datasets"][dataset]["images"]
        detail = f"On {counted(count, 'image')} no model is shown to be better than all others in {listed(open_)}."

        unbeaten = _unbeaten(document, dataset, metrics)
        if 1 < len(unbeaten) < len(document["models"]):
            detail += f" None is shown to be better than {' or '.join(unbeaten)}."
        return Finding("plain", f"No best model is shown{where}.", detail)

    if len(set(shown.values())) == 1:
        first = next(iter(shown.values()))
        titles = [PAIRED[metric].title for metric in shown]
        sentences = [_margin(document, dataset, metric, first) for metric in shown]
        return Finding(
            "good", f"{short(first)} is the best in {listed(titles)}{where}.", " ".join([*sentences, unclear]).strip()
        )
    each = [
        f"{short(model)} in {listed([PAIRED[m].title for m in shown if shown[m] == model])}"
        for model in dict.fromkeys(shown.values())
    ]
    return Finding("plain", f"No model is best in everything{where}: {'; '.join(each)}.", unclear)


def _unbeaten(document: dict[str, Any], dataset: str, metrics: list[str]) -> list[str]:
    """Return the models that lose no comparison by one of `metrics`."""
    rows = [row for row in document["comparisons"].get(dataset, []) if row["metric"] in metrics]
    losers = {
        row["first"] if better == row["second"] else row["second"]
        for row in rows
        if (better := winner(row)) is not None
    }
    return [short(model) for model in document["models"] if model not in losers]


def _margin(document: dict[str, Any], dataset: str, metric: str, first: str) -> str:
    """Say by how much the model wins in a metric, against the model that comes closest to it."""
    rows = [row for row in document["comparisons"][dataset] if row["metric"] == metric]
    wins = [Comparison.of_row(row) for row in rows if winner(row) == first]
    closest = min(wins, key=lambda one: abs(one.difference or 0.0))

    is_second = first == closest.second
    other, share = (closest.first, closest.wins) if is_second else (closest.second, 1.0 - closest.wins)

    about = PAIRED[metric]
    if not closest.is_shown:
        return f"{about.title}: {closest.identical}."
    gain = closest.gain(1 if is_second else -1)
    return f"{about.title} {about.direction} by {gain} than {short(other)}, on {percent(share)} of images."


def _appearance(metrics: dict[str, Any], model: str, where: str) -> Iterator[Finding]:
    """Say whether images come out foggy, washed out or blurred, and what is kept.

    `NEAR` is the distance from 1 that one would overlook. A property is wrong if its whole interval is farther from 1
    than that, on one side, and kept if its whole interval is within it. Otherwise it is reported as not shown.
    """
    known = {name: one for name in NEAR if (one := metrics.get(name)) and None not in (one["low"], one["high"])}
    wrong, kept, untold = [], [], []
    for name, summary in known.items():
        low, high = summary["low"], summary["high"]
        detail = f"{PAIRED[name].title} {summary['mean']:.3f} [{low:.3f}, {high:.3f}] of the image's"
        if high < 1 - NEAR[name] or low > 1 + NEAR[name]:
            wrong.append(((BELOW if high < 1 else ABOVE)[name], detail))
        elif 1 - NEAR[name] <= low and high <= 1 + NEAR[name]:
            kept.append((PAIRED[name].title, detail))
        else:
            untold.append((PAIRED[name].title, f"{detail}, where 1 within {NEAR[name]:g} would be kept"))

    shift = metrics.get("colour_shift")
    if shift and shift["low"] is not None and shift["low"] > VISIBLE:
        wrong.append(("off in colour", f"mean colour moved by {shift['mean']:.1f} ΔE, visible from {VISIBLE} on"))

    if wrong:
        yield _together("bad", f"{model} comes out {{}}{where}.", wrong)
    elif kept:
        yield _together("good", f"{model} keeps {{}}{where}.", kept)
    if untold:
        yield _together("plain", f"Whether {model} keeps {{}}{where} is not shown.", untold)


def _together(kind: str, headline: str, said: Sequence[tuple[str, str]]) -> Finding:
    """Join several remarks to one finding; `{}` in the headline becomes the list of words."""
    words, details = zip(*said, strict=True)
    return Finding(kind, headline.replace("{}", listed(words)), _sentence("; ".join(details)))


def _disturbed(robustness: dict[str, Any]) -> Iterator[Finding]:
    """Yield the models whose reconstructions are not finite under some probe."""
    for model, one in robustness.items():
        broken = not_finite(one) if one else {}
        if broken:
            details = (f"{count} of {counted(one['images'], 'image')} by {probe}" for probe, count in broken.items())
            yield Finding("bad", f"{short(model)} makes images that are not finite.", _sentence("; ".join(details)))


def _precision(verdicts: dict[str, Any]) -> Iterator[Finding]:
    """Yield which models are safe in float16 and which are not."""
    for is_safe, kind, words in ((True, "good", "safe"), (False, "bad", "not safe")):
        known = {short(model): one["verdict"] for model, one in verdicts.items() if one["is_safe"] == is_safe}
        if known:
            verb = "is" if len(known) == 1 else "are"
            reasons = [f"{model}: {verdict.partition('because ')[2] or verdict}." for model, verdict in known.items()]
            yield Finding(kind, f"{listed(list(known))} {verb} {words} in float16.", " ".join(reasons))


def cautions(document: dict[str, Any]) -> list[str]:
    """Return what a reader should know before quoting a number."""
    said = []
    counts = [about["images"] for about in document["datasets"].values()]
    sets = {
        name
        for by_model in document["metrics"].values()
        for one in by_model.values()
        for name in one
        if one[name] and name.startswith("rfid")
    }

    if sets and min(counts) < RELIABLE:
        said.append(
            f"An rFID of fewer than {RELIABLE:,} images is mostly the bias of few samples: compare it only between "
            "models on the same images, and prefer KID."
        )
    if sets:
        said.append("rFID says little about how well a diffusion model trains on the latents.")
    return said


def _sentence(text: str) -> str:
    """Begin with a capital letter and end with a full stop."""
    return f"{text[:1].upper()}{text[1:]}."
