"""Gates: the values that the metrics of an evaluation must reach, `gates: {psnr: 28, lpips_alex: 0.1}`.

A bound is the lowest value allowed if higher is better, and the highest if lower is better. For a metric with ideal
value 1 (saturation, contrast) it is the largest distance from 1 allowed.
"""

import difflib
import math
from collections import Counter
from typing import Any

from vae.errors import require
from vae.metrics.registry import METRICS, Metric

Gates = dict[str, float]


def parse_gates(given: dict[str, Any]) -> Gates:
    """Return the gates as floats.

    Raises InputError, naming the key, for an unknown metric, for a bound that is not a finite number, and for a
    negative distance.
    """
    for name, bound in given.items():
        near = difflib.get_close_matches(name, METRICS, n=1) or list(METRICS)
        require(name in METRICS, f"gates.{name}={bound}", f"a metric: {', '.join(near)}")

        is_number = isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)
        require(is_number, f"gates.{name}={bound}", f"a finite number: {_asked(METRICS[name], 'NUMBER')} is asked then")

        is_distance = METRICS[name].direction.startswith("nearer")
        expected = f"0 or more, the largest distance from {METRICS[name].ideal:g} that is allowed"
        require(not is_distance or bound >= 0, f"gates.{name}={bound}", expected)
    return {name: float(bound) for name, bound in given.items()}


def check(document: dict[str, Any], gates: dict[str, Any]) -> list[str]:
    """Return a sentence for every gate that a model fails on a dataset.

    A metric that was not measured fails its gate. All gates fail for a model that made a reconstruction which is not
    finite, because the means only cover the other images.
    """
    bounds = parse_gates(gates)
    failed = []
    for dataset, models in document["metrics"].items():
        about = document["datasets"][dataset]
        broken = Counter(one["model"] for one in about["not_finite"])
        for model, summaries in models.items():
            lost = f"{broken[model]} of {about['images']}" if broken[model] else ""
            for name, bound in bounds.items():
                failure = _failure(METRICS[name], bound, summaries.get(name), document["missing"].get(name), lost)
                failed += [f"{dataset}, {model}: {METRICS[name].title} {failure}"] if failure else []
    return failed


def _failure(metric: Metric, bound: float, summary: dict[str, Any] | None, reason: str | None, lost: str) -> str:
    """Say how the gate is failed; empty if it is passed.

    If every reconstruction equals its image, PSNR is infinite, has no mean, and passes any gate. `lost` says how many
    of how many reconstructions are not finite, and is empty if all are finite.
    """
    asked = f"{_asked(metric, f'{bound:g}')} is asked"
    of_others = f", and {lost} reconstructions are not finite" if lost else ""
    if summary is None:
        return f"is not measured, {asked}" + (f" ({reason})" if reason else "")

    mean = summary["mean"]
    if mean is None and not (metric.ideal == math.inf and summary["infinite"]):
        return f"has no value, {asked}{of_others}"

    if mean is not None and not _passes(metric, mean, bound):
        # A mean that only rounds to the bound is printed in full, else the sentence would contradict itself.
        shown = f"{mean:.{metric.digits}f}"
        just_missed = _passes(metric, float(shown), bound)
        return f"is {f'{mean if just_missed else shown} {metric.unit}'.rstrip()}, {asked}{of_others}"

    return f"has no number of every image: {lost} reconstructions are not finite" if lost else ""


def _passes(metric: Metric, mean: float, bound: float) -> bool:
    """Tell whether the mean is within the bound."""
    if metric.direction.startswith("nearer"):
        return metric.badness(mean) <= bound
    return mean >= bound if metric.direction == "higher" else mean <= bound


def _asked(metric: Metric, bound: str) -> str:
    """Say what a gate requires, as "at least 28" or "1 within 0.05"."""
    if metric.direction.startswith("nearer"):
        return f"{metric.ideal:g} within {bound}"
    return f"at {'least' if metric.direction == 'higher' else 'most'} {bound}"
