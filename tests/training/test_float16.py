"""The recipe for float16: a VAE that overflows decodes as in float32 afterwards, and the verdict says so."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import without_adversary
from tests.precision.test_precision import overflowing
from vae.config.compose import compose
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.build import open_sources
from vae.data.loader import first_images
from vae.data.transforms import to_model_range
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder
from vae.precision.audit import FLOAT16_MAX, audit_precision, rounding
from vae.training.train import train
from vae.weights import load_autoencoder, save_autoencoder


@pytest.fixture
def trained(tiny_run: TrainConfig) -> AutoencoderKL:
    """A little, with attention: its reconstructions are recognisable."""
    model = replace(tiny_run.model, mid_block_add_attention=True)
    run = train(without_adversary(replace(tiny_run, name="base", updates=60, validate_every=60, model=model)))
    found = load_autoencoder(run / "exports" / "step_0000060" / "diffusers")
    assert isinstance(found, AutoencoderKL)
    return found


@pytest.fixture
def held_out(tiny_run: TrainConfig) -> Tensor:
    return to_model_range(first_images(open_sources(tiny_run.data)[1], tiny_run.data, 3))


@torch.no_grad()
def psnr(model: Autoencoder, images: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """NaN where the model computes what is not finite."""
    with rounding(model, dtype):
        decoded = model.decode(model.encode(images).mode())
    return -10 * math.log10((decoded.clamp(-1, 1) - images).square().mean().item() / 4)


def exported(run: Path, step: int) -> Autoencoder:
    return load_autoencoder(run / "exports" / f"step_{step:07}" / "diffusers")


def test_a_vae_that_decodes_to_nan_in_float16_is_within_a_tenth_of_a_decibel_after_the_recipe(
    tiny_run, trained, held_out, tmp_path
):
    base, images = overflowing(trained), list(held_out[:2].split(1))
    assert math.isnan(psnr(base, held_out, torch.float16))
    assert "overflows" in audit_precision(base, images).verdict
    recipe = compose("experiment=float16", f"init={save_autoencoder(base, tmp_path / 'loud')}")
    small = replace(tiny_run, name="safe", model=AutoencoderConfig(), updates=20, validate_every=20)
    same = {key: getattr(recipe, key) for key in ("init", "fp16_safe", "frozen")}
    weights = replace(recipe.loss.weights, perceptual=0.0)
    after = exported(train(replace(small, loss=replace(recipe.loss, weights=weights), **same)), 20)
    found = psnr(after, held_out), psnr(after, held_out, torch.float16)
    assert found[0] > psnr(base, held_out) - 0.1
    assert abs(found[0] - found[1]) < 0.1
    assert audit_precision(after, images).is_safe
    assert not after.config.force_upcast


def test_where_rescaling_does_not_help_attention_scores_learn_to_fit(tiny_run, trained, held_out, tmp_path):
    """Products of queries and keys: no norm reads them, and no factor can be taken out of them.

    What that costs in images is 0.1 to 0.2 dB, by the CPU's instructions.
    """
    attention, images = "decoder.mid_block.attentions.0", list(held_out[:2].split(1))
    with torch.no_grad():
        peak = audit_precision(trained, images).peaks[f"{attention}.scores"]
        for name, parameter in trained.decoder.mid_block.attentions[0].named_parameters():
            if name.startswith(("to_q", "to_k")):
                parameter.mul_((2 * FLOAT16_MAX / peak) ** 0.5)
    before = audit_precision(trained, images)
    assert "(at decoder.mid_block.attentions.0.scores) and overflows" in before.verdict
    config = without_adversary(
        replace(tiny_run, name="lower", model=AutoencoderConfig(), updates=160, validate_every=160)
    )
    weights = replace(config.loss.weights, activation=0.1)
    loss = replace(
        config.loss, weights=weights, activation_limit=2_000.0
    )  # an audit's noise is louder than photographs
    config = replace(config, loss=loss, optim=replace(config.optim, learning_rate=2.0, gradient_clip=0.0))
    init = str(save_autoencoder(trained, tmp_path / "loud"))
    only = [f"{attention}.to_q", f"{attention}.to_k"]
    after = exported(train(replace(config, init=init, fp16_safe=True, trained=only)), 160)
    assert audit_precision(after, images).verdict.startswith("safe in float16: yes")
    assert psnr(after, held_out) > psnr(trained, held_out) - 1.0
