"""Drop-in replacement: can a model stand where the base stood, from which it was trained?

Two questions decide it. Have the latents moved, so that diffusion models trained on the base's latents no longer fit
(`latent_drift`, `latents_against_base`)? And is any measured metric worse (`judge`)?
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig, encoder_differences
from vae.evaluation.report.gallery import counted, listed, short
from vae.evaluation.statistics import FEWEST, Comparison, percent
from vae.latents import scale_latents, unscale_latents
from vae.metrics.registry import PAIRED
from vae.models.arithmetic import float32_arithmetic
from vae.models.base import Autoencoder

TOLERATED = 0.02  # of the standard deviation of the base's latents: a drop-in replacement stays within it


@dataclass(frozen=True)
class Drift:
    """The difference between an encoder and the base's, in weights, settings and latents.

    `changed` names the tensors that differ. `unlike` names the settings that differ, each in words: equal weights with
    other groups of the normalisation are another function. `rms` and `shift` are in units of the standard deviation of
    the base's latents.
    """

    changed: list[str]
    unlike: list[str]
    encoder_tensors: int
    rms: float  # root mean square difference of the posterior means
    shift: float  # largest difference of a channel's mean
    stretch: float  # largest relative difference of a channel's standard deviation

    @property
    def is_same(self) -> bool:
        """Whether weights and settings are identical."""
        return not self.changed and not self.unlike

    @property
    def is_tolerable(self) -> bool:
        """Whether every measure of drift is at most `TOLERATED`."""
        return max(self.rms, self.shift, self.stretch) <= TOLERATED

    @property
    def verdict(self) -> str:
        """The result as a sentence."""
        if self.is_same:
            return f"same latents: all {self.encoder_tensors} encoder tensors are identical bit for bit"
        moved = f"rms {self.rms:.2%}, mean {self.shift:.2%}, std {self.stretch:.2%} of the base's spread"
        count = f"{len(self.changed)} of {self.encoder_tensors} encoder tensors differ"
        differences = "; ".join([count, *self.unlike])
        if self.is_tolerable:
            return f"nearly the same latents: {differences}; {moved}"
        return f"latents have drifted: {differences}; {moved}. A diffusion model trained on the base will not fit"


@torch.no_grad()
@float32_arithmetic()
def latent_drift(base: Autoencoder, model: Autoencoder, images: Sequence[Tensor]) -> Drift:
    """Compare the latents of two encoders on `images`, each (B, C, H, W) in [-1, 1].

    The configurations must have latents of the same shape. If the architectures differ, the latents are compared as
    diffusion models see them, scaled, because a tiny autoencoder has no others.
    """
    unlike = base.config.latents_are_scaled != model.config.latents_are_scaled

    theirs, ours = _encoder_of(base), _encoder_of(model)
    shared = theirs.keys() & ours.keys()
    changed = [name for name in theirs | ours if name not in shared or not torch.equal(theirs[name], ours[name])]
    before, after = (
        torch.cat([_latents_of_images(one, image, scaled=unlike) for image in images], dim=1) for one in (base, model)
    )

    # Drift is measured in units of the base's spread, so that one tolerance fits latents of any scale.
    spread = before.std()
    return Drift(
        changed=changed,
        unlike=encoder_differences(model.config, base.config, "the base's"),
        encoder_tensors=len(theirs | ours),
        rms=((after - before).square().mean().sqrt() / spread).item(),
        shift=((after.mean(dim=1) - before.mean(dim=1)).abs().max() / spread).item(),
        stretch=(after.std(dim=1) / before.std(dim=1) - 1.0).abs().max().item(),
    )


def _latents_of_images(model: Autoencoder, image: Tensor, *, scaled: bool) -> Tensor:
    """Encode an image and return the posterior means, (latent_channels, elements)."""
    latents = model.encode(image).mean
    return (scale_latents(latents, model.config) if scaled else latents).transpose(0, 1).flatten(1)


def _encoder_of(model: Autoencoder) -> dict[str, Tensor]:
    """Return the tensors that the latents depend on."""
    return {name: t for name, t in model.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}


SEEN = 4  # the number of images whose latents are compared
OPEN = "no difference shown"
SIGNS = {"worse": -1, "perhaps worse": -1, "better": 1, "perhaps better": 1, OPEN: 0}

Document = dict[str, Any]
Compared = list[tuple[str, Comparison]]  # ("" or " on DATASET", the comparison of the base with one model there)


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
    """Compare the latents of each model with those of the first, which is the base; returns plain values for JSON.

    `images` are (1, C, H, W) in [-1, 1] on the models' device. `kind` is "same" (the encoders are identical bit for
    bit), "near", "drifted" or "other" (latents of another shape), and `verdict` says it in a sentence. `rescaled` says
    how the factors differ by which the exports scale latents for a diffusion model. It is None if they agree or if a
    file does not record its factor.
    """
    (_, base), *others = models.items()
    return {name: {"images": len(images)} | _latents(base, model, images) for name, model in others}


def judge(document: Document, model: str, latents: dict[str, Any]) -> dict[str, Any]:
    """Decide from the measurements of both whether `model` can replace the base, and say why.

    `is_harmless` is None if no harm is shown but the measurements cannot rule it out: a metric is perhaps worse, or a
    metric has numbers for fewer than `FEWEST` images of a dataset. The rules are a table in docs/evaluation.md, which
    the tests read.
    """
    compared = list(_compared(document, model))
    misfit = unfit(latents)
    losses = [*_said(compared, "worse"), *_broken(document, model), *_float16(document, model, -1)]
    doubts = [*_said(compared, "perhaps worse"), *_few(compared)]
    unsure = [] if misfit or latents.get("maybe_rescaled") is None else [latents["maybe_rescaled"]]

    # The first of these that applies decides.
    name = short(model)
    base = short(document["base"])
    if misfit:
        is_harmless = False
        headline = f"{name} is NOT a drop-in for {base}"
    elif losses:
        is_harmless = False
        headline = f"{name} fits where {base} did, but NOT without loss"
    elif unsure:
        is_harmless = None
        headline = f"{name} fits where {base} did, if its scale is that of {base}"
    elif not compared:
        is_harmless = None
        headline = f"{name} fits where {base} did; nothing measured tells whether it is better"
    elif doubts:
        is_harmless = None
        headline = f"{name} fits where {base} did; so few images do not tell whether it is better"
    else:
        is_harmless = True
        headline = f"{name} is a drop-in for {base}"

    fit = [] if misfit else [latents["verdict"].partition(":")[0]]
    merits = [*_said(compared, "better"), *_float16(document, model, 1), *_said(compared, "perhaps better")]
    reasons = [*misfit, *losses, *fit, *unsure, *doubts, *_single(compared), *merits, *_open(compared)]
    verdict = {"is_harmless": is_harmless, "headline": headline, "reasons": reasons}
    return verdict | {"verdict": f"{headline}: {'; '.join(reasons)}", "latents": latents}


def unfit(latents: dict[str, Any]) -> list[str]:
    """Say why a diffusion model trained on the base's latents cannot use these; empty if it can."""
    kind, verdict = latents["kind"], latents["verdict"]
    if kind == "other":
        return [verdict.partition(". ")[0]]
    if kind == "drifted":
        moved = latents["rms"]
        return [verdict.partition(":")[0] + ("" if moved is None else f" by {moved:.1%} of their spread")]
    return [] if latents["rescaled"] is None else [latents["rescaled"]]


def rescaled(before: AutoencoderConfig, now: AutoencoderConfig) -> str | None:
    """Say how programs that read the two configurations would scale the same latents differently in some channel.

    Returns None if they would scale them alike, and if the scale of one is only assumed. It also returns None if shape
    or architecture differ, since such latents are compared in another way.
    """
    if not (before.scale_is_known and now.scale_is_known):
        return None
    return _scaled_apart(before, now)


def maybe_rescaled(before: AutoencoderConfig, now: AutoencoderConfig) -> str | None:
    """Say how the two would scale latents differently, if a scale that no file states is the one that is assumed.

    Returns None if both scales are known, and if the assumed one makes no difference.
    """
    if before.scale_is_known and now.scale_is_known:
        return None
    apart = _scaled_apart(before.taking_its_scale(), now.taking_its_scale())
    return None if apart is None else f"{apart}, and one of them is assumed: family= states it"


def _scaled_apart(before: AutoencoderConfig, now: AutoencoderConfig) -> str | None:
    """Say how two scales differ in some channel, or return None if they do not or cannot be compared."""
    kinds = [(one.latents_are_scaled, one.latent_channels, one.downsample_factor) for one in (before, now)]
    if kinds[0] != kinds[1]:
        return None

    # A channel counts as moved if its factor or its shift, in units of its spread, differs by more than TOLERATED.
    seen = [_seen_through(one) for one in (before, now)]
    (shift, scale), (new_shift, new_scale) = seen
    apart = torch.maximum((new_scale / scale - 1.0).abs(), ((new_shift - shift) * scale).abs())
    if apart.max() <= TOLERATED:
        return None

    if all(one.latents_mean is None or one.latents_std is None for one in (before, now)):
        old, new = (
            f"{one.scaling_factor:.5g}" + (f" (shift {one.shift_factor:.4g})" if one.shift_factor is not None else "")
            for one in (before, now)
        )
        return f"its scaling factor is {new}, the base's {old}"

    # With a mean and deviation per channel, the sentence names the channel that differs most.
    worst = int(apart.argmax())
    old, new = (f"{float(scales[worst]):.5g} (shift {float(shifts[worst]):.4g})" for shifts, scales in seen)
    return f"the scale of its channel {worst} is {new}, the base's {old}"


def lines_against_base(document: Document, dataset: str, model: str) -> list[Line]:
    """Return a line for every metric that has a number for both the base and the model."""
    return [_line(document, dataset, Comparison.of_row(row)) for row in _rows(document, dataset, model)]


def _line(document: Document, dataset: str, one: Comparison) -> Line:
    """Put one comparison into words."""
    metric = PAIRED[one.metric]
    means = (one.before, one.after)
    if not one.known:  # evaluations of earlier versions have no means of the common images
        means = (document["metrics"][dataset][name][one.metric]["mean"] for name in (one.first, one.second))

    before, after = ("-" if mean is None else f"{mean:.{metric.digits}f}" for mean in means)
    title = " ".join(filter(None, (metric.title, metric.unit, metric.arrow)))
    gain = one.gain() + (f"; identical: {one.lost} lost, {one.gained} gained" if one.lost or one.gained else "")
    return Line(title, before, after, gain, percent(one.wins), _word(one))


def _latents(base: Autoencoder, model: Autoencoder, images: Sequence[Tensor]) -> dict[str, Any]:
    """Compare one model's latents with the base's, as `latents_against_base` returns it."""
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
        "rescaled": rescaled(before, now),
        "maybe_rescaled": maybe_rescaled(before, now),
        "changed": len(drift.changed),
        "encoder_tensors": drift.encoder_tensors,
    } | {name: value if math.isfinite(value) else None for name, value in moved.items()}


def _seen_through(config: AutoencoderConfig) -> tuple[Tensor, Tensor]:
    """Return shift and scale of each channel, both (C,), that lead from raw latents to those of a diffusion model.

    Both are measured by undoing the scaling of 0 and 1, so it does not matter how `config` states them.
    """
    zeros = torch.zeros(1, config.latent_channels, 1, 1, dtype=torch.float64)
    shift, one_further = (unscale_latents(seen, config).flatten() for seen in (zeros, zeros + 1.0))
    return shift, 1.0 / (one_further - shift)


def _rows(document: Document, dataset: str, model: str) -> list[dict[str, Any]]:
    """Return the comparisons of the base with `model` on a dataset."""
    asked = (document["base"], model)
    return [row for row in document["comparisons"][dataset] if (row["first"], row["second"]) == asked]


def _compared(document: Document, model: str) -> Iterator[tuple[str, Comparison]]:
    """Yield the comparisons of the base with `model` on all datasets, each with the name of its dataset in words."""
    for dataset in document["datasets"]:
        where = f" on {short(dataset)}" if len(document["datasets"]) > 1 else ""
        yield from ((where, Comparison.of_row(row)) for row in _rows(document, dataset, model))


def _word(one: Comparison) -> str:
    """Return the verdict on one metric, one of `SIGNS`.

    "Perhaps worse" has two possible reasons. The metric's own interval excludes 0 while the difference is not
    significant once it is corrected for the number of comparisons, or the model is worse on every image. "Perhaps
    better" has the first reason only.
    """
    is_below = one.high is not None and one.high < 0
    is_above = one.low is not None and one.low > 0
    shown = (is_above - is_below) if one.is_shown else 0
    if -1 in (shown, one.sign_of_lost):
        return "worse"
    if is_below or (one.is_worse_on_all and not one.is_few):
        return "perhaps worse"
    if 1 in (shown, one.sign_of_lost):
        return "better"
    return "perhaps better" if is_above else OPEN


def _said(compared: Compared, word: str) -> list[str]:
    """Say by how much each metric with the verdict `word` changed."""
    said = [(where, one) for where, one in compared if _word(one) == word]
    return [f"{PAIRED[one.metric].title} {word}{_by(one, SIGNS[word])}{where}" for where, one in said]


def _by(one: Comparison, sign: int) -> str:
    """Say how large a difference is.

    The mean is given if it points in the direction of `sign`. The number of images is given if the model is worse on
    each of them and the interval of the mean does not show it.
    """
    by = f" by {one.gain(sign)}" if one.difference and one.difference * sign > 0 else ""
    is_in_interval = one.low is None or one.high is None or one.low <= 0 <= one.high
    each = f" on each of {counted(one.known, 'image')}" if one.is_worse_on_all and is_in_interval else ""
    return by + each + (f" ({_no_longer_identical(one)})" if one.lost else "")


def _no_longer_identical(one: Comparison) -> str:
    """Say how many reconstructions no longer equal their image, and how many now do."""
    others = f", {one.gained} others are" if one.gained else ""
    return f"{one.lost} of {counted(one.known, 'image')} no longer identical{others}"


def _few(compared: Compared) -> Iterator[str]:
    """Say what was measured on too few images: a whole dataset, or a metric that applies to some images only."""
    if not compared:
        yield "no metric of single images was measured, and those of whole sets show no difference: measure psnr too"
    for where in dict.fromkeys(where for where, _ in compared):
        here = [one for at, one in compared if at == where]
        few = [one for one in here if one.is_few]
        if all(one.is_few or not one.known for one in here):
            count = max(one.images for one in here)
            yield f"{counted(count, 'image')}{where} cannot show a difference, {FEWEST} can"
        elif few:
            each = (f"{PAIRED[one.metric].title} of {counted(one.images, 'image')}" for one in few)
            yield f"{listed(list(each))}{where} cannot show a difference, {FEWEST} images can"


def _single(compared: Compared) -> Iterator[str]:
    """Report the changes on single images, which a mean over many images hides."""
    for where, one in compared:
        if one.lost and _word(one) == OPEN:
            yield f"{_no_longer_identical(one)}{where}"
    for where in dict.fromkeys(where for where, _ in compared):
        each = [_badly_worse(one) for at, one in compared if at == where and one.badly_worse]
        if each:
            yield f"badly worse{where}: {listed(each)}"


def _badly_worse(one: Comparison) -> str:
    """Say on how many images the model is badly worse in a metric, and how much worse at most."""
    metric = PAIRED[one.metric]
    worst = f"{one.worst:.{metric.digits}f} {metric.unit}".rstrip()
    return f"{one.badly_worse} of {counted(one.known, 'image')} in {metric.title} (at worst by {worst})"


def _open(compared: Compared) -> Iterator[str]:
    """List by dataset the metrics in which no difference is shown."""
    for where in dict.fromkeys(where for where, _ in compared):
        here = [one for at, one in compared if at == where and one.known and not one.is_few]
        left = [one for one in here if _word(one) == OPEN]
        if left:
            yield f"{OPEN} in {listed([PAIRED[one.metric].title for one in left])}{where}"


def _broken(document: Document, model: str) -> list[str]:
    """Count the reconstructions that are not finite where the base's reconstruction is."""
    count = 0
    for about in document["datasets"].values():
        broken = Counter((one["image"], one["model"]) for one in about["not_finite"])
        of_model = ((image, number) for (image, name), number in broken.items() if name == model)
        count += sum(max(0, number - broken[image, document["base"]]) for image, number in of_model)
    return [f"{counted(count, 'reconstruction')} not finite"] if count else []


def _float16(document: Document, model: str, sign: int) -> list[str]:
    """Say whether safety in float16 was lost (`sign` -1) or gained (`sign` 1)."""
    before, now = (document["precision"].get(name, {}).get("is_safe") for name in (document["base"], model))
    if sign < 0:
        return ["no longer safe in float16"] if before and now is False else []
    return ["safe in float16, as the base is not"] if now and before is False else []
