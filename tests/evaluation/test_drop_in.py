"""Models beside a base: are the latents its own, what is better or worse, and the sentence that says so."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import read_json
from tests.evaluation.reported import blurred, evaluation, foggy
from tests.evaluation.test_report import _photographs
from vae.config.data import DataConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import EvaluateConfig
from vae.errors import InputError
from vae.evaluation.drop_in import judge, latents_against_base, unfit
from vae.evaluation.evaluate import evaluate
from vae.evaluation.report.findings import findings
from vae.evaluation.report.images import grid
from vae.evaluation.report.page import render
from vae.latents import scale_latents
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder
from vae.weights.ldm import to_ldm

PHOTOS = DataConfig(source="photos", resolution=32, validation_batch_size=2, workers=0)
SAME = {"kind": "same", "verdict": "same latents: all 30 encoder tensors are identical bit for bit", "rescaled": None}
DRIFTED = {"kind": "drifted", "verdict": "latents have drifted: 1 of 30", "rescaled": None, "rms": 0.123}


def _tuned(model: AutoencoderKL, part: str, by: float = 0.1) -> AutoencoderKL:
    tuned = AutoencoderKL(model.config).eval()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in tuned.get_submodule(part).parameters():
            parameter.add_(by)
    return tuned


@pytest.fixture
def base(tiny: AutoencoderConfig, perturbed: Callable[..., AutoencoderKL]) -> AutoencoderKL:
    return perturbed(tiny)


def _latents(base: AutoencoderKL, model: AutoencoderKL) -> dict[str, Any]:
    images = [torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in range(2)]
    return latents_against_base({"base": base, "model": model}, images)["model"]


def test_models_stand_beside_the_base_in_the_files_the_terminal_and_the_first_sentence(tmp_path, base, capsys):
    paths = [save_autoencoder(base, tmp_path / "base")]
    paths += [save_autoencoder(_tuned(base, part), tmp_path / part) for part in ("decoder", "encoder")]
    given = {"base": str(paths[0]), "model": [str(path) for path in paths[1:]], "output": str(tmp_path / "made")}
    folder = evaluate(EvaluateConfig(**given, metrics=["psnr", "ssim"], probe_images=0, data=PHOTOS))
    document = read_json(folder / "metrics.json")
    assert (document["base"], list(document["models"])) == ("base", ["base", "decoder", "encoder"])
    assert document["comparisons"]["photos"][0]["first"] == "base"
    assert (document["robustness"], list(document["precision"])) == ({}, ["base", "decoder", "encoder"])
    kinds = {model: about["latents"]["kind"] for model, about in document["against_base"].items()}
    assert kinds == {"decoder": "same", "encoder": "drifted"}
    verdict = (
        "decoder fits where base did; so few images do not tell whether it is better: same latents; 5 images cannot"
    )
    assert document["against_base"]["decoder"]["verdict"].startswith(verdict)
    printed = capsys.readouterr().out
    assert "identical bit for bit" in printed
    assert verdict in printed
    assert "encoder is NOT a drop-in for base: latents have drifted by" in printed
    page = (folder / "report.html").read_text()
    assert page.index("decoder fits where base did") < page.index("encoder is NOT a drop-in") < page.index("float16.")
    with Image.open(folder / "before_after.png") as picture:
        assert 4 * 128 < picture.width < 5 * 128  # four images
        assert 7 * 128 < picture.height < 8 * 150  # inputs, and of three models images and errors


def test_latents_of_another_shape_are_other_latents(tiny, perturbed, base):
    other = _latents(base, perturbed(replace(tiny, latent_channels=5)))
    assert other["kind"] == "other"
    assert unfit(other) == ["other latents: f2c5, the base has f2c3"]


def test_an_encoder_with_a_layer_more_is_not_the_same(tiny, perturbed):
    without = perturbed(replace(tiny, use_quant_conv=False))
    model = AutoencoderKL(tiny).eval()
    model.load_state_dict(model.state_dict() | without.state_dict())
    assert _latents(without, model)["changed"] == 2


def test_the_same_tensors_in_other_groups_are_another_encoder(tiny, base):
    other = AutoencoderKL(replace(tiny, norm_num_groups=8)).eval()
    other.load_state_dict(base.state_dict())
    latents = _latents(base, other)
    assert (latents["kind"], latents["changed"]) == ("drifted", 0)
    assert "norm_num_groups is 8, the base's is 4" in latents["verdict"]
    assert "latents have drifted by" in unfit(latents)[0]


def test_the_same_encoder_with_another_scale_is_no_drop_in(base):
    tuned = _tuned(base, "decoder")
    assert _latents(base, tuned)["rescaled"] is None
    tuned.config = replace(tuned.config, scaling_factor=0.5)
    latents = _latents(base, tuned)
    assert (latents["kind"], latents["rescaled"]) == ("same", "its scaling factor is 0.5, the base's 0.18215")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents_std": [5.0, 8.0, 5.0]}, "the scale of its channel 1 is 0.022769 (shift 0), the base's 0.03643"),
        ({"latents_mean": [0.0, 0.0, 1.0]}, "the scale of its channel 2 is 0.03643 (shift 1), the base's 0.03643"),
        (
            {"latents_mean": None, "latents_std": None},
            "the scale of its channel 0 is 0.18215 (shift 0), the base's 0.0",
        ),
        ({"latents_mean": None, "latents_std": None, "scaling_factor": 0.18215 / 5.0}, None),  # in other words
        ({"latents_std": [5.0, 5.05, 4.95]}, None),  # 1 %
    ],
)
def test_latents_that_are_scaled_otherwise_in_one_channel_are_no_drop_in(base, changes, said):
    """As a diffusion model sees them: another standard deviation is another scale, however it is written down."""
    per_channel = {"latents_mean": [0.0, 0.0, 0.0], "latents_std": [5.0, 5.0, 5.0]}
    base.config = replace(base.config, **per_channel)
    tuned = _tuned(base, "decoder")
    tuned.config = replace(tuned.config, **changes)
    latents = _latents(base, tuned)
    assert (latents["kind"], latents["rescaled"] is None) == ("same", said is None)
    assert (latents["rescaled"] or "").startswith(said or "")
    assert bool(unfit(latents)) == (said is not None)
    seen = [scale_latents(torch.full((1, 3, 2, 2), 5.0), one.config) for one in (base, tuned)]
    is_same = torch.allclose(*seen, rtol=0.02, atol=0.0)
    assert is_same == (said is None)


def test_small_changes_of_an_encoder_are_near_the_base(base):
    assert _latents(base, _tuned(base, "quant_conv", by=1e-6))["kind"] == "near"


def test_numbers_that_are_not_finite_are_null(base):
    broken = _tuned(base, "quant_conv", by=float("nan"))
    latents = _latents(base, broken)
    assert (latents["kind"], latents["rms"]) == ("drifted", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "/nowhere", "model": "."}, "base='/nowhere': no such file or folder"),
        ({"base": "a", "model": None}, "model=None, expected a path"),
        ({"base": "a", "model": []}, r"model=\[\], expected a path"),
    ],
)
def test_what_cannot_be_held_against_is_refused_by_key(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(**given, output=str(tmp_path), data=PHOTOS))


@pytest.fixture(scope="module")
def reported() -> Any:
    """The base makes fog: one model makes less of it, one blurs as well, one is as it was."""
    damages = {"before": foggy, "after": _hazy, "worse": lambda image: blurred(foggy(image)), "alike": foggy}
    document, rows, pictures = evaluation(_photographs(16), damages)
    return document | {"base": "before"}, rows, pictures


def _hazy(image: Tensor) -> Tensor:
    return (image.float() * 0.95 + 6.0).round().to(torch.uint8)


def _judged(document: dict[str, Any], model: str, latents: dict[str, Any] = SAME, **changes: Any) -> dict[str, Any]:
    return judge(document | changes, model, latents)


def test_what_is_better_comes_with_its_interval(reported):
    judged = _judged(reported[0], "after")
    shown = [
        one for one in reported[0]["comparisons"]["photos"] if one["verdict"].startswith("after is better than bef")
    ]
    assert judged["is_harmless"] is True
    assert judged["verdict"].startswith("after is a drop-in for before: same latents; PSNR better by ")
    assert (
        len([reason for reason in judged["reasons"] if re.search(r" better by .+ \[.+, .+\]$", reason)])
        == len(shown)
        > 3
    )


def test_where_no_difference_is_shown_that_is_said(reported):
    verdict = "alike is a drop-in for before: same latents; no difference shown in PSNR, SSIM, L1, "
    assert _judged(reported[0], "alike")["verdict"].startswith(verdict)


def test_what_is_worse_is_no_harmless_change_and_comes_first(reported):
    judged = _judged(reported[0], "worse")
    assert judged["is_harmless"] is False
    assert judged["headline"] == "worse fits where before did, but NOT without loss"
    assert " worse by " in judged["reasons"][0]
    assert "same latents" in judged["reasons"]


def test_drifted_latents_are_no_drop_in_however_good_the_images(reported):
    judged = _judged(reported[0], "after", DRIFTED)
    assert judged["verdict"].startswith("after is NOT a drop-in for before: latents have drifted by 12.3% of their spr")
    assert judged["is_harmless"] is False


def test_lost_float16_and_broken_images_are_losses(reported):
    document = reported[0]
    unsafe = document["precision"] | {"after": document["precision"]["after"] | {"is_safe": False}}
    assert "no longer safe in float16" in _judged(document, "after", precision=unsafe)["reasons"]
    broken = document["datasets"]["photos"] | {"not_finite": [{"image": "000.png", "model": "after"}]}
    assert "1 reconstruction not finite" in _judged(document, "after", datasets={"photos": broken})["reasons"]


def test_a_page_with_a_base_opens_with_the_verdict_and_has_the_table_and_the_pictures(reported):
    document, rows, pictures = reported
    verdicts = {model: judge(document, model, SAME) for model in ("after", "worse")}
    document = document | {"against_base": verdicts}
    assert [one.headline for one in findings(document)][:2] == [f"{one['headline']}." for one in verdicts.values()]
    page = render(document, rows, pictures, grid(document, pictures))
    assert "Is it harmless?" in page
    assert page.count('<td class="better">better</td>') > 0
    assert page.count('<td class="worse">worse</td>') > 0
    assert '<img class="grid" src="data:image/' in page
    assert 'data-left="1" data-right="3"' in page
    assert len(render(document, rows, pictures, grid(document, pictures), most_bytes=400_000).encode()) <= 400_000


def test_what_only_its_own_interval_shows_is_perhaps_worse_and_nothing_is_proved(reported):
    rows = [dict(one) for one in reported[0]["comparisons"]["photos"]]
    (row,) = [one for one in rows if (one["metric"], one["first"], one["second"]) == ("psnr", "before", "alike")]
    row.update(difference=-0.5, low=-0.9, high=-0.1, p=0.2)
    judged = _judged(reported[0], "alike", comparisons={"photos": rows})
    assert judged["is_harmless"] is None
    assert "PSNR perhaps worse by 0.500 dB [0.100, 0.900]" in judged["reasons"]


def test_a_base_in_ldms_names_that_may_be_sds_or_sdxls_is_no_reason_against_another_scale(tmp_path, base, perturbed):
    one = tmp_path / "sdxl.safetensors"
    network = replace(base.config, latent_channels=4, block_out_channels=[32, 32], norm_num_groups=32)
    published = perturbed(network)
    save_file(to_ldm(dict(published.state_dict()), network), one)  # without a word of ours in it
    tuned = save_autoencoder(perturbed(replace(network, scaling_factor=0.13025)), tmp_path / "tuned")
    (tuned / "diffusion_pytorch_model.safetensors").unlink()
    save_file(dict(published.state_dict()), tuned / "diffusion_pytorch_model.safetensors")
    given = {"base": str(one), "model": str(tuned), "output": str(tmp_path / "made")}
    config = EvaluateConfig(**given, metrics=["psnr"], probe_images=0, data=PHOTOS)  # pyright: ignore[reportArgumentType]
    document = read_json(evaluate(config) / "metrics.json")
    latents = document["against_base"]["tuned"]["latents"]
    assert (latents["kind"], latents["rescaled"]) == ("same", None)
    verdict = document["against_base"]["tuned"]
    assert verdict["is_harmless"] is None
    doubt = "its scaling factor is 0.13025, the base's 0.18215, and one of them is assumed: family= states it"
    assert doubt in verdict["reasons"]


def test_a_model_that_is_made_for_smaller_images_than_it_is_measured_on_is_told_of(tmp_path, base, perturbed, capsys):
    small = save_autoencoder(perturbed(replace(base.config, sample_size=16)), tmp_path / "small")
    other = save_autoencoder(base, tmp_path / "other")
    models = [str(small), str(other)]
    evaluate(EvaluateConfig(model=models, output=str(tmp_path / "made"), metrics=["psnr"], probe_images=0, data=PHOTOS))
    printed = capsys.readouterr().out
    assert "note: small is made for 16 px and measured at data.resolution=32" in printed
    assert "note: other" not in printed
