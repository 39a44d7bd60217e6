"""All rows of an evaluation in the order of the images, whoever measured them and when."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vae.evaluation.rows import Line, unpacked

Vectors = dict[str, np.ndarray]
ORIGINAL = ""  # in the place of a model's name: the images themselves


@dataclass
class Collected:
    """Of one data set: lines by index without what was packed into them, and that, as arrays."""

    lines: list[Line] = field(default_factory=list)  # of images that were measured
    left_out: list[Line] = field(default_factory=list)
    features: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)  # model -> convention -> per image
    latents: dict[str, list[Vectors]] = field(default_factory=dict)  # model -> per image

    def column(self, model: str, metric: str) -> np.ndarray:
        """A value per image: NaN where there is none, be it that it does not apply or that an image is not finite."""
        values = (line["models"][model].get("metrics", {}).get(metric) for line in self.lines)
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)

    def of_both(self, model: str, convention: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) of images and of their reconstructions, of those images whose reconstruction is finite."""
        if not any(line["models"][model]["is_finite"] for line in self.lines):
            return np.zeros((0, 0)), np.zeros((0, 0))
        both = zip(self.features[ORIGINAL][convention], self.lines, strict=True)
        originals = [features for features, line in both if line["models"][model]["is_finite"]]
        return np.stack(originals), np.stack(self.features[model][convention])


def collect(lines: Iterable[Line], datasets: Sequence[str], models: Sequence[str]) -> dict[str, Collected]:
    """A line of every image, in the order of data sets and indices; one that was measured before one left out."""
    order = {name: number for number, name in enumerate(datasets)}
    found: dict[tuple[int, int], Line] = {}
    for line in lines:
        key = order[line["dataset"]], line["index"]
        if key not in found or "left_out" in found[key]:
            found[key] = _unpacked(line)
    collected = {name: Collected() for name in datasets}
    for key in sorted(found):
        line = found.pop(key)
        _take(collected[line["dataset"]], line, models)
    return collected


def _unpacked(line: Line) -> Line:
    """With its arrays as they were: their text is a third larger and would stay in memory with them."""
    for packed in [line, *line.get("models", {}).values()]:
        for kind in ("features", "latents"):
            if kind in packed:
                packed[kind] = {name: unpacked(value) for name, value in packed[kind].items()}
    return line


def _take(into: Collected, line: Line, models: Sequence[str]) -> None:
    if "left_out" in line:
        into.left_out.append(line)
        return
    _add(into.features.setdefault(ORIGINAL, {}), line.pop("features"))
    for name in models:
        result: dict[str, Any] = line["models"][name]
        _add(into.features.setdefault(name, {}), result.pop("features", {}))
        if "latents" in result:
            into.latents.setdefault(name, []).append(result.pop("latents"))
    into.lines.append(line)


def _add(into: dict[str, list[np.ndarray]], features: Vectors) -> None:
    for convention, values in features.items():
        into.setdefault(convention, []).append(values)
