"""All rows of an evaluation in the order of the images, whoever measured them and when."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vae.evaluation.rows import Line, unpacked
from vae.models.inception import CONVENTIONS

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
        both = zip(self.features[ORIGINAL][convention], self.lines, strict=True)
        originals = [features for features, line in both if line["models"][model]["is_finite"]]
        if not originals:
            return np.zeros((0, 0)), np.zeros((0, 0))
        return np.stack(originals), np.stack(self.features[model][convention])


def collect(lines: Iterable[Line], datasets: Sequence[str], models: Sequence[str]) -> dict[str, Collected]:
    """The first line of every image, in the order of data sets and indices."""
    order = {name: number for number, name in enumerate(datasets)}
    found: dict[tuple[int, int], Line] = {}
    for line in lines:
        found.setdefault((order[line["dataset"]], line["index"]), line)
    collected = {name: Collected() for name in datasets}
    for key in sorted(found):
        line = found.pop(key)
        _take(collected[line["dataset"]], line, models)
    return collected


def _take(into: Collected, line: Line, models: Sequence[str]) -> None:
    if "left_out" in line:
        into.left_out.append(line)
        return
    _add(into.features.setdefault(ORIGINAL, {}), line.pop("features"))
    for name in models:
        result: Mapping[str, Any] = line["models"][name]
        if not result["is_finite"]:
            continue
        _add(into.features.setdefault(name, {}), line["models"][name].pop("features"))
        if "latents" in result:
            latents = line["models"][name].pop("latents")
            into.latents.setdefault(name, []).append({key: unpacked(value) for key, value in latents.items()})
    into.lines.append(line)


def _add(into: dict[str, list[np.ndarray]], features: Mapping[str, list[Any]]) -> None:
    for convention in CONVENTIONS:
        if convention in features:
            into.setdefault(convention, []).append(unpacked(features[convention]))
