"""Whether an encoder is a base's own: its tensors and the settings that say what is computed with them."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.evaluation.drop_in import TOLERATED, latent_drift
from vae.models.autoencoder_kl import AutoencoderKL

OF_OTHERS: dict[str, Any] = {  # settings of the decoder, of diffusion models and of other programs
    "out_channels": 1,
    "use_post_quant_conv": False,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
    "latents_mean": [0.1, 0.2, 0.3],
    "latents_std": [1.0, 2.0, 3.0],
    "force_upcast": False,
    "sample_size": 32,
}
OF_THE_ENCODER: dict[str, Any] = {
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "mid_block_add_attention": False,
    "attention_levels": [1],
    "block_out_channels": [8, 24],
}
OF_THE_LATENTS = {"architecture", "in_channels", "latent_channels", "mid_block_pool"}  # what else differs then is plain


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.rand(1, 3, 16, 16) * 2 - 1 for _ in range(2)]


def _with(model: AutoencoderKL, **changes: Any) -> AutoencoderKL:
    """Another configuration with the same weights, as far as they fit."""
    other = AutoencoderKL(replace(model.config, **changes)).eval()
    ours = other.state_dict()
    theirs = {name: t for name, t in model.state_dict().items() if name in ours and t.shape == ours[name].shape}
    other.load_state_dict(ours | theirs)
    return other


def test_every_setting_is_the_encoders_or_somebody_elses():
    assert {field.name for field in fields(AutoencoderConfig)} == OF_THE_ENCODER.keys() | OF_OTHERS | OF_THE_LATENTS


def test_encoders_of_other_groups_are_not_the_same_though_every_tensor_is(tiny, perturbed, images):
    base = perturbed(tiny)
    drift = latent_drift(base, _with(base, norm_num_groups=8), images)
    assert drift.changed == []
    assert drift.rms > 2 * TOLERATED
    assert not drift.is_same
    assert "identical" not in drift.verdict
    assert drift.verdict.startswith("latents have drifted: 0 of ")
    assert "norm_num_groups is 8, the base's is 4" in drift.verdict


@pytest.mark.parametrize("name", OF_THE_ENCODER)
def test_a_setting_of_the_encoder_that_differs_is_said(tiny, perturbed, images, name):
    base = perturbed(tiny)
    drift = latent_drift(base, _with(base, **{name: OF_THE_ENCODER[name]}), images)
    assert not drift.is_same
    assert f"{name} is {OF_THE_ENCODER[name]}, the base's is {getattr(tiny, name)}" in drift.verdict


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_setting_of_anything_else_changes_neither_the_latents_nor_the_verdict(tiny, perturbed, images, name):
    base = perturbed(tiny)
    other = _with(base, **{name: OF_OTHERS[name]})
    with torch.no_grad():
        assert torch.equal(base.encode(images[0]).mean, other.encode(images[0]).mean)
    drift = latent_drift(base, other, images)
    assert drift.is_same
    assert drift.verdict.startswith("same latents: all ")


def test_the_order_in_which_levels_are_named_is_no_difference(tiny, perturbed, images):
    base = perturbed(replace(tiny, attention_levels=[0, 1]))
    assert latent_drift(base, _with(base, attention_levels=[1, 0]), images).is_same
