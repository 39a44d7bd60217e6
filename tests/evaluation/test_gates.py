"""Limits that an evaluation must keep."""

import math
from typing import Any

import pytest

from vae.errors import InputError
from vae.evaluation.gates import check, parse_gates
from vae.metrics.registry import METRICS


def _document(**means: float | None) -> dict[str, Any]:
    summaries = {name: {"mean": mean, "infinite": 0} for name, mean in means.items()}
    photos = {"images": 10, "not_finite": []}
    return {"datasets": {"photos": photos}, "metrics": {"photos": {"tiny": summaries}}, "missing": {}}


@pytest.mark.parametrize(
    ("metric", "passing", "failing", "bound", "words"),
    [
        ("psnr", 28.0, 27.999999, 28, "PSNR is 27.999999 dB, at least 28 is asked"),
        ("psnr", 28.0, 27.5, 28, "PSNR is 27.500 dB, at least 28 is asked"),
        ("ssim", 0.9, 0.85, 0.9, "SSIM is 0.8500, at least 0.9 is asked"),
        ("lpips_alex", 0.1, 0.11, 0.1, "LPIPS (AlexNet) is 0.1100, at most 0.1 is asked"),
        ("rfid", 0.7, 0.71, 0.7, "rFID is 0.710, at most 0.7 is asked"),
        ("contrast", 1.04, 1.06, 0.05, "contrast is 1.0600, 1 within 0.05 is asked"),
        ("contrast", 0.96, 0.94, 0.05, "contrast is 0.9400, 1 within 0.05 is asked"),
    ],
)
def test_a_gate_has_the_direction_of_its_metric(metric, passing, failing, bound, words):
    assert check(_document(**{metric: passing}), {metric: bound}) == []
    assert check(_document(**{metric: failing}), {metric: bound}) == [f"photos, tiny: {words}"]


def test_every_model_on_every_dataset_is_checked():
    summary = {"psnr": {"mean": 25.0, "infinite": 0}, "ssim": {"mean": 0.7, "infinite": 0}}
    document: dict[str, Any] = {
        "datasets": {d: {"images": 10, "not_finite": []} for d in ("photos", "faces")},
        "metrics": {d: {"a": summary, "b": summary} for d in ("photos", "faces")},
        "missing": {},
    }
    failures = check(document, {"psnr": 28, "ssim": 0.8})
    assert len(failures) == 8
    assert failures[0] == "photos, a: PSNR is 25.000 dB, at least 28 is asked"
    assert failures[-1] == "faces, b: SSIM is 0.7000, at least 0.8 is asked"


def test_a_metric_that_is_not_measured_fails_with_its_reason():
    document = _document(psnr=30.0)
    document["missing"]["rfid"] = "no weights"
    document["metrics"]["photos"]["tiny"]["rfid"] = None
    words = ["photos, tiny: rFID is not measured, at most 1 is asked (no weights)"]
    assert check(document, {"psnr": 28, "rfid": 1}) == words
    assert check(document, {"kid": 1}) == ["photos, tiny: KID is not measured, at most 1 is asked"]


def test_images_that_are_not_finite_fail_every_gate_of_their_model():
    """The mean is of the others: 4 of 10 here, and all of them fine."""
    document = _document(psnr=30.0, ssim=0.7)
    document["metrics"]["photos"]["other"] = document["metrics"]["photos"]["tiny"]
    document["datasets"]["photos"]["not_finite"] = [{"image": f"{n}.png", "model": "tiny"} for n in range(6)]
    lost = "6 of 10 reconstructions are not finite"
    assert check(document, {"psnr": 28, "ssim": 0.8}) == [
        f"photos, tiny: PSNR has no number of every image: {lost}",
        f"photos, tiny: SSIM is 0.7000, at least 0.8 is asked, and {lost}",
        "photos, other: SSIM is 0.7000, at least 0.8 is asked",
    ]
    document["metrics"]["photos"]["tiny"]["psnr"] = {"mean": None, "infinite": 4}
    assert check(document, {"psnr": 28})[0] == f"photos, tiny: PSNR has no number of every image: {lost}"


def test_images_without_any_error_pass_and_no_value_fails():
    document = _document(psnr=None)
    assert check(document, {"psnr": 28}) == ["photos, tiny: PSNR has no value, at least 28 is asked"]
    document["metrics"]["photos"]["tiny"]["psnr"]["infinite"] = 3
    assert check(document, {"psnr": 28}) == []


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"psmr": 28}, "gates.psmr=28, expected a metric: psnr"),
        ({"colour": 1}, "gates.colour=1, expected a metric: "),
        ({"psnr": "28"}, "gates.psnr=28, expected a finite number: at least NUMBER"),
        ({"psnr": True}, "gates.psnr=True, expected a finite number"),
        ({"lpips_vgg": math.nan}, "gates.lpips_vgg=nan, expected a finite number: at most NUMBER"),
        ({"contrast": -0.1}, "gates.contrast=-0.1, expected 0 or more, the largest distance from 1"),
    ],
)
def test_a_wrong_gate_is_refused_by_its_key(gates, message):
    with pytest.raises(InputError, match=message):
        parse_gates(gates)


def test_every_metric_can_be_a_gate():
    assert check(_document(**{name: metric.ideal for name, metric in METRICS.items()}), dict.fromkeys(METRICS, 0)) == []
