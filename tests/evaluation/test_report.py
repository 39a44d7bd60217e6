"""The report without a browser: which images it shows, what it says, and that it stays small, closed and the same."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.evaluation.reported import crossed, evaluation
from vae.evaluation.report.findings import findings
from vae.evaluation.report.gallery import choose, harmless, rankings
from vae.evaluation.report.images import Pictures, amplified, as_data, error_gain, latent_map
from vae.evaluation.report.page import render
from vae.evaluation.report.sections import matrices


def test_a_failed_gate_is_told_whole_and_only_names_are_shortened(reported):
    """D15: a rule for names was applied to the sentence, and cut it within a word."""
    document = reported[0]
    name = f"{'a' * 60}/{'b' * 60}.safetensors"
    failed = [f"photos, {name}: LPIPS (AlexNet) is 0.1216, at most 0.1 is asked"]
    renamed = document | {"models": document["models"] | {name: {}}, "gates": {"asked": {}, "failed": failed}}
    (gate,) = [finding for finding in findings(document | {"gates": renamed["gates"]}) if "gate" in finding.headline]
    assert "LPIPS (AlexNet) is 0.1216, at most 0.1 is asked" in gate.detail


def _photographs(count: int, size: int = 64) -> dict[str, Tensor]:
    """Smooth random pictures, each with its own contrast and detail."""
    generator = torch.Generator().manual_seed(0)
    images = {}
    for number in range(count):
        coarse = torch.rand(1, 3, 3 + number % 9, 3 + number % 7, generator=generator) * (80 + 8 * number)
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0]
        grain = torch.randn(3, size, size, generator=generator) * (number % 5)
        images[f"{number:03}.png"] = (smooth + grain + 20).clamp(0, 255).to(torch.uint8)
    return images


@pytest.fixture(scope="module")
def reported() -> Any:
    return evaluation(_photographs(16))


@pytest.fixture(scope="module")
def page(reported: Any) -> str:
    return render(*reported)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(page)
    return parser.tags


def test_the_worst_and_the_best_of_every_model_and_metric_are_shown_with_a_typical_one_first(reported):
    document, rows, _ = reported
    chosen, ranks = choose(document, rows, most=100), rankings(document, rows)
    for model in document["models"]:
        order = ranks["photos", "psnr", model]
        assert {("photos", order[0]["index"]), ("photos", order[-1]["index"])} <= set(chosen)
    first = ranks["photos", "psnr", "blurred"]
    assert chosen[0] == ("photos", first[len(first) // 2 - 1]["index"])
    assert len(set(chosen)) == len(chosen)
    assert choose(document, rows, most=4) == chosen[:4]


def test_images_without_any_number_do_no_harm(reported):
    document, rows, pictures = reported
    infinite = [
        row | {"metrics": dict.fromkeys(row["metrics"], number)} for number in (float("inf"), None) for row in rows
    ]
    assert choose(document, infinite, most=3)
    assert "<html" in render(document, infinite[:3], pictures)


def test_the_page_loads_nothing_and_allows_only_its_own_style_and_script(page):
    tags = _tags(page)
    addresses = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert not [key for _, attributes in tags for key in attributes if key == "style" or key.startswith("on")]
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    for kind, text in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (found,) = re.findall(text, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_a_text_and_is_in_the_page_once(page):
    images = [
        attributes
        for tag, attributes in _tags(page)
        if tag == "img" and not (attributes.get("id") or "").endswith("-image")
    ]
    assert all(one.get("alt") is not None for one in images)
    kept = [one["id"] for one in images if "id" in one]
    shown = {one["data-of"] for one in images if "data-of" in one}
    assert shown <= set(kept)
    assert len(kept) == len(set(kept)) > 20


@pytest.mark.parametrize("most", [200_000, 600_000, 3_000_000])
def test_the_page_stays_within_the_bytes_it_is_given(reported, most):
    page = render(*reported, most_bytes=most)
    assert len(page.encode()) <= most
    assert page.count("<img id=") > 3


def test_the_same_evaluation_gives_the_same_bytes(reported, page):
    assert render(*reported) == page


def test_the_findings_name_the_best_model_and_what_a_viewer_would_see(reported):
    document = reported[0]
    said = " ".join(f"{one.headline} {one.detail}" for one in findings(document))
    assert "foggy comes out foggy" in said
    assert "blurred comes out blurred" in said
    assert "is the best in" in said
    assert "safe in float16" in said
    assert "1 image could not be measured." in said


@pytest.mark.parametrize(
    ("low", "high", "kind", "words"),
    [
        (0.820, 0.951, "plain", "Whether model keeps contrast is not shown."),
        (0.960, 1.051, "plain", "Whether model keeps contrast is not shown."),
        (0.90, 1.10, "plain", "Whether model keeps contrast is not shown."),
        (0.955, 1.045, "good", "model keeps contrast."),
        (0.82, 0.94, "bad", "model comes out foggy."),
        (1.06, 1.2, "bad", "model comes out harsh."),
    ],
)
def test_contrast_is_kept_only_where_the_whole_interval_is(reported, low, high, kind, words):
    mean = (low + high) / 2
    document = {"metrics": {"photos": {"model": {"contrast": {"mean": mean, "low": low, "high": high}}}}}
    found = findings(_of_one_model(reported[0]) | document)
    assert [one.kind for one in found if one.headline == words] == [kind]
    assert sum("contrast" in one.headline or "comes out" in one.headline for one in found) == 1


def test_what_is_kept_is_told_apart_from_what_is_not_shown(reported):
    summaries = {"contrast": (0.99, 0.98, 1.0), "saturation": (0.884, 0.82, 0.951)}
    metrics = {name: dict(zip(("mean", "low", "high"), one, strict=True)) for name, one in summaries.items()}
    found = findings(_of_one_model(reported[0]) | {"metrics": {"photos": {"model": metrics}}})
    assert [one.headline for one in found if "keeps" in one.headline] == [
        "model keeps contrast.",
        "Whether model keeps saturation is not shown.",
    ]


def _of_one_model(document: dict[str, Any]) -> dict[str, Any]:
    about = next(iter(document["models"].values()))
    return document | {"models": {"model": about}, "comparisons": {"photos": []}, "latents": {}, "robustness": {}}


def test_images_that_are_not_finite_when_disturbed_are_counted_where_their_numbers_stand(reported):
    """Two of four images survive the strongest noise, none survives a tile."""
    document, rows, pictures = reported
    model = next(iter(document["models"]))
    survived = {"mean": 21.5, "identical": 0, "not_finite": 2}
    lost = {"mean": None, "identical": 0, "not_finite": 4}
    probed = document["robustness"][model] | {
        "latent_noise": [{"noise": 0.5, "psnr": survived}],
        "equivariance": [{"transform": "flip", "psnr": survived, "to_image": survived}],
        "tiled": [{"tile": 64, "decoded": lost, "encoded_and_decoded": lost}],
    }
    precision = document["precision"] | {model: document["precision"][model] | {"psnr": {"float16": None}}}
    document = document | {"robustness": document["robustness"] | {model: probed}, "precision": precision}
    page = render(document, rows, pictures)
    assert "<b>21.5 (2 not finite)</b>" in page
    assert page.count("<b>not finite</b>") == 3  # two of tiles, and float16
    assert f"{model}: 2 of 4 images not finite by latent noise, and not in its means" in page
    (finding,) = [one for one in findings(document) if one.headline.endswith("makes images that are not finite.")]
    assert finding.kind == "bad"
    assert finding.detail == "2 of 4 images by latent noise; 2 of 4 images by equivariance; 4 of 4 images by tiled."


def test_equal_models_are_not_ranked():
    document, _, _ = evaluation(_photographs(8), {"a": lambda image: image // 2, "b": lambda image: image // 2})
    assert findings(document)[0].headline == "No best model is shown."


def test_what_was_not_measured_is_said_with_its_reason(page):
    assert "not measured: vgg16-397923af.pth is not there" in page
    assert "tiled: not measured, latents are 8x8 cells" in page


def test_crossed_encoders_and_decoders_become_a_matrix():
    document, rows, pictures = evaluation(_photographs(8))
    assert matrices(document, "photos") == []
    crossed(document, rows, "jpeg", "blurred")
    (matrix,) = [one for one in matrices(document, "photos") if one.metric.title == "PSNR"]
    cells = dict(matrix.lines)
    assert matrix.decoders == ["blurred", "foggy", "jpeg"]
    assert cells["jpeg"][0][0] == cells["blurred"][0][0]
    assert cells["jpeg"][0][2].startswith(("+", "\u2212"))
    assert "Do encoders and decoders fit each other?" in render(document, rows, pictures)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_are_shown(channels):
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    latents = torch.randn(channels, 4, 4)
    assert amplified(image, image, 4).getextrema() == ((0, 0),) * 3
    assert as_data(latent_map(latents), 5_000).startswith("data:image/webp;base64,")
    assert error_gain([Pictures(image, {"a": image})]) == 32


def test_errors_are_of_the_originals_whatever_the_pictures_lose(reported):
    document, rows, pictures = reported
    exact = {
        case: Pictures(one.image, {model: one.image for model in one.reconstructions}) for case, one in pictures.items()
    }
    page = render(document, rows, exact, most_bytes=200_000)
    errors = [a["src"] for tag, a in _tags(page) if tag == "img" and (a.get("id") or "").startswith("p0e")]
    for error in errors:
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode((error or "").split(",")[1]))).convert("RGB"))
        assert decoded.max() <= 1


def test_names_become_one_line_of_visible_characters():
    assert harmless("a\nb\u202egpj.exe\udcff\x00") == "a\\nb\\u202egpj.exe\\udcff\\x00"
    assert harmless("ünïcode \u65e5\u672c \N{FAMILY}") == "ünïcode \u65e5\u672c \N{FAMILY}"
