"""What metrics.json says of whole sets of images."""

import numpy as np
import pytest

from vae.evaluation.results import ORIGINAL, Collected, of_dataset
from vae.evaluation.statistics import FEWEST


def _collected(count: int) -> Collected:
    generator = np.random.default_rng(1)
    images = generator.standard_normal((count, 16))
    others = images + 0.3 * generator.standard_normal((count, 16))
    results = {"model": {"is_finite": True, "is_identical": False, "metrics": {}}}
    lines = [{"image": f"{number}.png", "enlarged": False, "models": results} for number in range(count)]
    features = {ORIGINAL: {"legacy": list(images)}, "model": {"legacy": list(others)}}
    return Collected(lines=lines, features=features)


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1, FEWEST])
def test_a_kernel_distance_has_an_interval_from_as_many_images_on_as_every_other_metric(count):
    header = {"measured": ["kid"], "missing": {}, "models": {"model": {"encoder": "a", "decoder": "a"}}}
    kid = of_dataset(_collected(count), header)["metrics"]["model"]["kid"]
    assert (kid["mean"] is None) == (count < 2)
    assert (kid["low"] is None, kid["high"] is None) == (count < FEWEST,) * 2
    assert count < FEWEST or kid["low"] < kid["mean"] < kid["high"]
