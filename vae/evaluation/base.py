"""What has become of a base: are the latents still its own, is anything worse, and so, is a model harmless?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vae.audit.drift import TOLERATED, latent_drift
from vae.evaluation.comparing import Comparison, percent
from vae.evaluation.report.wording import counted, listed, short
from vae.evaluation.statistics import FEWEST
from vae.metrics.registry import PAIRED
from vae.models.autoencoder_config import AutoencoderConfig
from vae.models.interface import Autoencoder

SEEN = 4  # images whose latents are compared
OPEN = "no difference shown"
SIGNS = {"worse": -1, "perhaps worse": -1, "better": 1, "perhaps better": 1, OPEN: 0}

Document = dict[str, Any]
Compared = list[tuple[str, Comparison]]  # where ("", or " on DATASET"), and the base with one model there


@dataclass(frozen=True)
class Line:
    """One metric of the base and of a model, in words; `verdict` is one of `SIGNS`."""

    title: str
    before: str
    after: str
    gain: str
    wins: str
    verdict: str


def latents_against_base(models: Mapping[str, Autoencoder], images: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Of each model but the first, which is the base: plain numbers for JSON.

    `images` are (1, C, H, W) in [-1, 1] on the models' device. `kind` is "same" (the encoder is, bit for bit), "near",
    "drifted" or "other" (of another shape); `verdict` says it in a sentence; `rescaled` says how the exports differ in
    what they ask a diffusion model's latents to be multiplied by, if they do and both files tell it.
    """
    (_, base), *others = models.items()
    found = {name: {"images": len(images)} | _latents(base, model, images) for name, model in others}
    told = {name: base.config.scale_is_known and model.config.scale_is_known for name, model in others}
    return {name: one if told[name] else one | {"rescaled": None} for name, one in found.items()}


def judge(document: Document, model: str, latents: dict[str, Any]) -> dict[str, Any]:
    """Whether `model` can stand where the base stood, and why, from what was measured of both.

    `is_harmless` is None where no harm is shown and images are too few to say more: none can show any, or a metric's
    own interval does and all of them together do not.
    """
    compared, misfit = list(_compared(document, model)), unfit(latents)
    both = short(model), short(document["base"])
    losses = [*_said(compared, "worse"), *_broken(document, model), *_float16(document, model, -1)]
    doubts = _said(compared, "perhaps worse")
    is_few = bool(doubts) or all(one.images < FEWEST for _, one in compared)
    if misfit:
        is_harmless, headline = False, "{} is NOT a drop-in for {}".format(*both)
    elif losses:
        is_harmless, headline = False, "{} fits where {} did, but NOT without loss".format(*both)
    else:
        is_harmless = None if is_few else True
        known, unknown = (
            "{} is a drop-in for {}",
            "{} fits where {} did; so few images do not tell whether it is better",
        )
        headline = (unknown if is_few else known).format(*both)
    merits = [*_said(compared, "better"), *_float16(document, model, 1), *_said(compared, "perhaps better")]
    fit = [] if misfit else [latents["verdict"].partition(":")[0]]
    reasons = [*misfit, *losses, *fit, *doubts, *merits, *_open(compared)]
    verdict = {"is_harmless": is_harmless, "headline": headline, "reasons": reasons}
    return verdict | {"verdict": f"{headline}: {'; '.join(reasons)}", "latents": latents}


def unfit(latents: dict[str, Any]) -> list[str]:
    """Why a diffusion model trained on the base's latents cannot go on with these; nothing where it can."""
    kind, verdict = latents["kind"], latents["verdict"]
    if kind == "other":
        return [verdict.partition(". ")[0]]
    if kind == "drifted":
        moved = latents["rms"]
        return [verdict.partition(":")[0] + ("" if moved is None else f" by {moved:.1%} of their spread")]
    return [] if latents["rescaled"] is None else [latents["rescaled"]]


def lines_against_base(document: Document, dataset: str, model: str) -> list[Line]:
    """By every metric that both have a number of."""
    return [_line(document, dataset, Comparison.of_row(row)) for row in _rows(document, dataset, model)]


def _line(document: Document, dataset: str, one: Comparison) -> Line:
    metric = PAIRED[one.metric]
    means = (document["metrics"][dataset][name][one.metric]["mean"] for name in (one.first, one.second))
    before, after = ("-" if mean is None else f"{mean:.{metric.digits}f}" for mean in means)
    title = " ".join(filter(None, (metric.title, metric.unit, metric.arrow)))
    return Line(title, before, after, one.gain(), percent(one.wins), _word(one))


def _latents(base: Autoencoder, model: Autoencoder, images: Sequence[Tensor]) -> dict[str, Any]:
    before, now = base.config, model.config
    shapes = [f"f{one.downsample_factor}c{one.latent_channels}" for one in (before, now)]
    if shapes[0] != shapes[1]:
        verdict = f"other latents: {shapes[1]}, the base has {shapes[0]}. Its diffusion models cannot read them"
        return {"kind": "other", "verdict": verdict, "rescaled": None}
    drift = latent_drift(base, model, images)
    kind = "near" if drift.is_tolerable else "drifted"
    moved = {name: getattr(drift, name) for name in ("rms", "shift", "stretch")}
    return {
        "kind": "same" if drift.is_same else kind,
        "verdict": drift.verdict,
        "rescaled": _rescaled(before, now) if before.architecture == now.architecture else None,
        "changed": len(drift.changed),
        "encoder_tensors": drift.encoder_tensors,
    } | {name: value if math.isfinite(value) else None for name, value in moved.items()}


def _rescaled(before: AutoencoderConfig, now: AutoencoderConfig) -> str | None:
    """Programs that read an export's configuration would scale the same latents in another way."""
    shift = abs((now.shift_factor or 0.0) - (before.shift_factor or 0.0)) * before.scaling_factor
    if max(abs(now.scaling_factor / before.scaling_factor - 1.0), shift) <= TOLERATED:
        return None
    old, new = (
        f"{one.scaling_factor:.5g}" + (f" (shift {one.shift_factor:.4g})" if one.shift_factor is not None else "")
        for one in (before, now)
    )
    return f"its scaling factor is {new}, the base's {old}"


def _rows(document: Document, dataset: str, model: str) -> list[dict[str, Any]]:
    asked = (document["base"], model)
    return [row for row in document["comparisons"][dataset] if (row["first"], row["second"]) == asked]


def _compared(document: Document, model: str) -> Iterator[tuple[str, Comparison]]:
    for dataset in document["datasets"]:
        where = f" on {short(dataset)}" if len(document["datasets"]) > 1 else ""
        yield from ((where, Comparison.of_row(row)) for row in _rows(document, dataset, model))


def _word(one: Comparison) -> str:
    """ "perhaps": by the interval of this metric alone, and not of as many as were compared."""
    sure = "" if one.is_shown else "perhaps "
    if one.high is not None and one.high < 0:
        return f"{sure}worse"
    return f"{sure}better" if one.low is not None and one.low > 0 else OPEN


def _said(compared: Compared, word: str) -> list[str]:
    sign = SIGNS[word]
    return [
        f"{PAIRED[one.metric].title} {word} by {one.gain(sign)}{where}" for where, one in compared if _word(one) == word
    ]


def _open(compared: Compared) -> Iterator[str]:
    for where in dict.fromkeys(where for where, _ in compared):
        left = [one for at, one in compared if at == where and _word(one) == OPEN]
        count = max((one.images for one in left), default=FEWEST)
        if count < FEWEST:
            yield f"{counted(count, 'image')}{where} cannot show a difference, {FEWEST} can"
        elif left:
            yield f"{OPEN} in {listed([PAIRED[one.metric].title for one in left])}{where}"


def _broken(document: Document, model: str) -> list[str]:
    """Images that come out as what is not a number, where the base's do not."""
    pairs = [(one["image"], one["model"]) for about in document["datasets"].values() for one in about["not_finite"]]
    count = sum(name == model and (image, document["base"]) not in pairs for image, name in pairs)
    return [f"{counted(count, 'reconstruction')} not finite"] if count else []


def _float16(document: Document, model: str, sign: int) -> list[str]:
    before, now = (document["precision"].get(name, {}).get("is_safe") for name in (document["base"], model))
    if sign < 0:
        return ["no longer safe in float16"] if before and now is False else []
    return ["safe in float16, as the base is not"] if now and before is False else []
