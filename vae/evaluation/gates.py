"""What the metrics of an evaluation must reach: `gates: {psnr: 28, lpips_alex: 0.1}`."""

import difflib
import math
from typing import Any

from vae.errors import require
from vae.metrics.registry import METRICS, Metric

Gates = dict[str, float]


def parse_gates(given: dict[str, Any]) -> Gates:
    """The same as numbers; what cannot be a gate is refused by its key."""
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
    """What the means of metrics.json miss, a sentence for each dataset, model and gate; a metric not measured fails."""
    bounds = parse_gates(gates)
    return [
        f"{dataset}, {model}: {METRICS[name].title} {failure}"
        for dataset, models in document["metrics"].items()
        for model, summaries in models.items()
        for name, bound in bounds.items()
        if (failure := _failure(METRICS[name], bound, summaries.get(name), document["missing"].get(name)))
    ]


def _failure(metric: Metric, bound: float, summary: dict[str, Any] | None, reason: str | None) -> str:
    """Empty where the gate is passed. Where every image is without an error, PSNR has no mean and passes any gate."""
    asked = f"{_asked(metric, f'{bound:g}')} is asked"
    if summary is None:
        return f"is not measured, {asked}" + (f" ({reason})" if reason else "")
    mean = summary["mean"]
    if mean is None:
        return "" if metric.ideal == math.inf and summary["infinite"] else f"has no value, {asked}"
    if _passes(metric, mean, bound):
        return ""
    shown = f"{mean:.{metric.digits}f}"
    just_missed = _passes(metric, float(shown), bound)
    return f"is {f'{mean if just_missed else shown} {metric.unit}'.rstrip()}, {asked}"


def _passes(metric: Metric, mean: float, bound: float) -> bool:
    if metric.direction.startswith("nearer"):
        return metric.badness(mean) <= bound
    return mean >= bound if metric.direction == "higher" else mean <= bound


def _asked(metric: Metric, bound: str) -> str:
    if metric.direction.startswith("nearer"):
        return f"{metric.ideal:g} within {bound}"
    return f"at {'least' if metric.direction == 'higher' else 'most'} {bound}"
