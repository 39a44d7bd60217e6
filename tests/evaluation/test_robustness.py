"""Probes against autoencoders whose answers are known, and tiles against diffusers."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.data.transforms import to_model_range
from vae.evaluation.robustness import (
    LATENT_NOISE,
    ROUNDS,
    TRANSFORMS,
    Subject,
    decibels,
    input_noise,
    latent_noise,
    masked,
    precision,
    probe,
    probe_steps,
    tiled,
)
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.posterior import DiagonalGaussian
from vae.precision.audit import audit_precision, audit_steps
from vae.weights.formats import to_diffusers_config


@dataclass
class Scripted:
    """Encodes and decodes by two functions; by default those of the perfect autoencoder, of factor 1."""

    encoder: Callable[[Tensor], Tensor] = lambda x: x
    decoder: Callable[[Tensor], Tensor] = lambda x: x

    def encode(self, images: Tensor) -> DiagonalGaussian:
        latents = self.encoder(images)
        return DiagonalGaussian(latents, torch.full_like(latents, -30.0))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


@pytest.fixture
def images() -> list[Tensor]:
    """Two of 32x48 pixels, their greys not extreme, so that noise is not clamped."""
    return [to_model_range(torch.randint(64, 192, (1, 3, 32, 48)).to(torch.uint8)) for _ in range(2)]


def _probe(model: Any, images: list[Tensor]) -> dict[str, Any]:
    result = probe(model, images)
    json.dumps(result, allow_nan=False)
    return result


def _same(value: dict[str, Any]) -> bool:
    return value == {"mean": None, "identical": 2, "not_finite": 0}


def test_the_perfect_autoencoder_is_perfect_in_every_way(images):
    result = _probe(Scripted(), images)
    assert _same(result["plain"])
    assert [entry["transform"] for entry in result["equivariance"]] == list(TRANSFORMS)
    assert all(_same(entry["psnr"]) and _same(entry["to_image"]) for entry in result["equivariance"])
    assert [entry["round"] for entry in result["drift"]] == list(range(1, ROUNDS + 1))
    assert all(_same(entry["psnr"]) for entry in result["drift"])
    assert all(_same(result["tiled"][0][name]) for name in ("decoded", "encoded_and_decoded", "to_image"))
    assert result["missing"] == {}


def test_it_restores_nothing_either(images):
    result = _probe(Scripted(), images)
    assert all(entry["psnr"] == entry["input"] for entry in result["input_noise"] + result["masked"])
    assert all(entry["psnr_masked"] == entry["input_masked"] for entry in result["masked"])


def test_an_autoencoder_that_knows_the_image_restores_it(images):
    knowing, subject = Scripted(decoder=lambda _: images[0]), Subject(images[0], images[0], images[0], seed=0)
    noisy = [*latent_noise(knowing, subject, 0.5), *input_noise(knowing, subject)]
    holed = list(masked(knowing, subject))
    assert [values["psnr"] for _, values in [*noisy, *holed]] == [math.inf] * 9
    assert [values["psnr_masked"] for _, values in holed] == [math.inf] * 3


def test_noise_has_the_decibels_of_its_standard_deviation(images):
    result = _probe(Scripted(), images)
    for entry, share in zip(result["latent_noise"], LATENT_NOISE, strict=True):
        expected = 10 * math.log10(4.0 / (share * result["latent_std"]) ** 2)
        assert entry["noise"] == share
        if share <= 0.5:  # nothing is clamped
            assert entry["psnr"]["mean"] == pytest.approx(expected, abs=0.3)
    for entry in result["input_noise"]:
        assert entry["input"]["mean"] == pytest.approx(20 * math.log10(255 / entry["levels"]), abs=0.3)
    std = torch.cat([image.flatten() for image in images]).std(correction=0).item()
    assert result["latent_std"] == pytest.approx(std, rel=1e-5)


def test_masks_cover_the_share_they_name(images):
    """Of grey 192 only the replaced pixels differ, by 64 levels."""
    grey = to_model_range(torch.full((1, 3, 32, 48), 192, dtype=torch.uint8))
    for entry in _probe(Scripted(), [grey])["masked"]:
        assert entry["input_masked"]["mean"] == pytest.approx(20 * math.log10(255 / 64))
        whole = 20 * math.log10(255 / 64) - 10 * math.log10(entry["share"])
        assert entry["input"]["mean"] == pytest.approx(whole, abs=1e-9)


def test_decoders_that_depend_on_the_place_do_not_commute(images):
    ramp = torch.linspace(-0.3, 0.3, 48).expand(32, 48)

    def placed(latents: Tensor) -> Tensor:
        return latents + ramp[: latents.shape[-2], : latents.shape[-1]] if latents.shape[-1] <= 48 else latents

    entries = {
        entry["transform"]: entry for entry in _probe(Scripted(decoder=placed), [images[0][..., :32]])["equivariance"]
    }
    assert all(entries[name]["psnr"]["identical"] == 0 for name in ("shift", "flip", "rotation"))
    assert entries["shift"]["psnr"]["mean"] > entries["flip"]["psnr"]["mean"] + 20  # one of 48 steps of the ramp


def test_where_the_decoder_commutes_the_transformed_image_costs_what_the_plain_one_does(images):
    """Halved resolution commutes exactly; latents are 2x2 means."""
    coarse = Scripted(
        lambda x: torch.nn.functional.avg_pool2d(x, 2), lambda z: z.repeat_interleave(2, -1).repeat_interleave(2, -2)
    )
    result = _probe(coarse, images)
    for entry in result["equivariance"]:
        if entry["transform"] in ("flip", "rotation"):
            assert _same(entry["psnr"])
            assert entry["to_image"]["mean"] == pytest.approx(result["plain"]["mean"], abs=1e-9)
        if entry["transform"] == "shift":
            assert _same(entry["psnr"])


def test_drift_goes_on_with_what_was_seen(images):
    fading = _probe(Scripted(decoder=lambda z: 0.9 * z), images)
    assert fading["drift"][0]["psnr"] == fading["plain"]
    means = [entry["psnr"]["mean"] for entry in fading["drift"]]
    assert all(after < before for before, after in pairwise(means))
    settled = _probe(Scripted(decoder=lambda z: (4 * z).round() / 4), images)["drift"]
    assert settled[-1]["psnr"] == settled[0]["psnr"]


def test_images_that_are_not_finite_are_counted_and_spoil_no_mean(images):
    def broken(latents: Tensor) -> Tensor:
        return latents * math.nan if torch.equal(latents, images[1]) else 0.9 * latents

    result, alone = _probe(Scripted(decoder=broken), images), _probe(Scripted(decoder=broken), images[:1])
    assert result["plain"] == alone["plain"] | {"not_finite": 1}
    assert [entry["psnr"] for entry in result["drift"]] == [e["psnr"] | {"not_finite": 1} for e in alone["drift"]]
    everything = _probe(Scripted(encoder=lambda x: x * math.nan), images)
    assert everything["latent_std"] is None
    assert everything["latent_noise"][0]["psnr"] == {"mean": None, "identical": 0, "not_finite": 2}


@pytest.mark.parametrize(("height", "width", "tile"), [(40, 64, 16), (48, 48, 16), (26, 50, 8), (64, 20, 32)])
def test_tiles_equal_those_of_diffusers(perturbed, height, width, tile):
    """Sides in latent cells of 2 pixels; some leave slivers."""
    config = AutoencoderConfig(block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
    ours = perturbed(config)
    theirs = cast(Any, Authority.from_config(to_diffusers_config(config))).eval()  # untyped upstream
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, 2 * tile
    pictures = torch.rand(1, 3, 2 * height, 2 * width) * 2 - 1
    with torch.no_grad():
        latents = tiled(lambda x: ours.encode(x).mode(), pictures, 2 * tile, tile)
        torch.testing.assert_close(latents, theirs.encode(pictures).latent_dist.mode(), atol=1e-5, rtol=0)
        decoded = tiled(ours.decode, latents, tile, 2 * tile)
        torch.testing.assert_close(decoded, theirs.decode(latents).sample, atol=1e-5, rtol=0)


def test_what_does_not_apply_is_null_with_a_reason(perturbed, tiny):
    model = perturbed(tiny)
    result = _probe(model, [torch.rand(1, 3, 6, 32) * 2 - 1])
    assert result["tiled"] is None
    assert result["equivariance"] is None
    assert result["missing"] == {
        "equivariance": "latents are 16x3 cells, it takes 4x4; measure larger images",
        "tiled": "latents are 16x3 cells, which is one tile of 16x16; measure larger images",
    }
    assert len(result["drift"]) == ROUNDS


def test_the_same_numbers_every_time_and_the_model_as_it_was(perturbed, tiny):
    model, pictures = perturbed(tiny), [torch.rand(1, 3, 40, 40) * 2 - 1 for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: list[None] = []
    first = probe(model, pictures, lambda: steps.append(None))
    torch.manual_seed(1)
    torch.randn(7)
    assert probe(model, pictures) == first
    assert len(steps) == probe_steps(pictures)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_encoder_of_one_goes_with_the_decoder_of_another(perturbed, tiny):
    one, other, pictures = perturbed(tiny), perturbed(tiny), [torch.rand(1, 3, 32, 32) * 2 - 1]
    result = _probe(Scripted(lambda x: one.encode(x).mode(), other.decode), pictures)
    with torch.no_grad():
        expected = decibels(other.decode(one.encode(pictures[0]).mode()), pictures[0])
    assert result["plain"]["mean"] == expected != _probe(one, pictures)["plain"]["mean"]


def test_precision_is_the_audits_in_plain_numbers(perturbed, tiny):
    model, pictures = perturbed(tiny), [torch.rand(1, 3, 32, 32) * 2 - 1]
    steps: list[None] = []
    audit, result = audit_precision(model, pictures), precision(model, pictures, lambda: steps.append(None))
    assert len(steps) == audit_steps(pictures)
    assert (result["verdict"], result["is_safe"], result["psnr"]) == (audit.verdict, True, audit.psnr)
    assert [(one["layer"], one["peak"]) for one in result["largest"]] == audit.largest[:5]


def test_precision_of_a_model_that_overflows_is_still_strict_json(perturbed, tiny):
    model = cast(AutoencoderKL, perturbed(tiny))
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(1e30)
        model.decoder.conv_out.weight.mul_(1e30)
    result = precision(model, [torch.rand(1, 3, 32, 32) * 2 - 1])
    json.dumps(result, allow_nan=False)
    assert not result["is_safe"]
    assert result["psnr"]["float16"] is None
