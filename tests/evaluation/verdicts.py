"""Results of a base and of a tuned model as columns of numbers, and what is said of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vae.evaluation.drop_in import judge
from vae.evaluation.statistics import compare_pairs

SAME = {"kind": "same", "verdict": "same latents: all 30 encoder tensors are identical bit for bit", "rescaled": None}
PHOTOS, DRAWINGS = "photos", "drawings"
COUNT = 40  # images of `alike`

Both = tuple[np.ndarray, np.ndarray]  # the base's and the model's number of each image


@dataclass
class Results:
    """`columns` by data set and metric; `broken` images of the tuned model are not finite."""

    columns: dict[str, dict[str, Both]]
    latents: dict[str, Any] = field(default_factory=lambda: dict(SAME))
    broken: int = 0
    is_safe: bool = True

    @property
    def document(self) -> dict[str, Any]:
        """What `judge` reads of metrics.json."""
        broken = [{"image": f"{number}.png", "model": "tuned"} for number in range(self.broken)]
        return {
            "base": "base",
            "models": {"base": {}, "tuned": {}},
            "datasets": {name: {"not_finite": broken if name == PHOTOS else []} for name in self.columns},
            "comparisons": {
                name: compare_pairs({model: _of(by_metric, side) for side, model in enumerate(("base", "tuned"))})
                for name, by_metric in self.columns.items()
            },
            "precision": {"base": {"is_safe": True}, "tuned": {"is_safe": self.is_safe}},
        }

    def judged(self) -> dict[str, Any]:
        return judge(self.document, "tuned", self.latents)


def alike() -> Results:
    """By no metric a difference: what one image gains another loses."""
    means = {"psnr": (29.0, 0.2), "ssim": (0.8, 0.005), "l1": (0.03, 0.001), "contrast": (0.95, 0.01)}
    photos = {name: moved(mean, spread) for name, (mean, spread) in means.items()}
    photos["saturation"] = moved(0.9, 0.01)
    return Results({PHOTOS: photos})


def moved(mean: float, spread: float, by: float = 0.0, count: int = COUNT) -> Both:
    """Numbers around `mean`, then each plus or minus up to `spread` and `by` further."""
    generator = np.random.default_rng(1)
    before = generator.normal(mean, abs(mean) / 20, count)
    signs = np.where(np.arange(count) % 2, 1.0, -1.0)
    steps = np.repeat(generator.uniform(0.5, 1.0, count // 2 + 1), 2)[:count]
    return before, before + spread * signs * steps + by


def _of(by_metric: dict[str, Both], side: int) -> dict[str, np.ndarray]:
    return {name: both[side] for name, both in by_metric.items()}
