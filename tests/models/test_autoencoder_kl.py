"""The authority is diffusers' AutoencoderKL, built from the configuration that our exports carry."""

from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority

from tests.presets import AT_FULL_SIZE, PRESETS, preset
from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights.formats import to_diffusers_config


def test_every_preset_of_the_issue_is_there():
    assert {"sd", "sdxl", "sd3", "flux", "kl_f4", "kl_f16", "kl_f32", "tiny"} <= set(PRESETS)


def test_the_sd_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AutoencoderKL(preset("sd"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


@pytest.mark.parametrize("name", AT_FULL_SIZE)
def test_keys_shapes_moments_and_images_equal_diffusers(name, perturbed):
    config = preset(name)
    ours = perturbed(config)
    theirs = cast(Any, Authority.from_config(to_diffusers_config(config))).eval()  # untyped upstream
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict(), strict=True)

    images = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.decode(expected.mean), theirs.decode(expected.mean).sample, atol=1e-4, rtol=0)

    there_and_back = AutoencoderKL(config).eval()
    there_and_back.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(there_and_back.encode(images).mean, posterior.mean)


def test_checkpointing_changes_neither_output_nor_gradient(tiny):
    model = AutoencoderKL(tiny)
    images = torch.rand(1, 3, 16, 16)
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        reconstructions, posterior = model(images, torch.Generator().manual_seed(0))
        (reconstructions.square().mean() + posterior.kl().mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_checkpointing_keeps_fewer_bytes_for_backward(tiny):
    model = AutoencoderKL(tiny)
    kept = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        sizes: list[int] = []

        def record(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            model(torch.rand(1, 3, 32, 32))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_a_half_precision_model_decodes_its_own_posterior(tiny):
    model = AutoencoderKL(tiny).to(torch.bfloat16)
    reconstructions, _ = model(torch.rand(1, 3, 16, 16, dtype=torch.bfloat16))
    assert reconstructions.dtype == torch.bfloat16


def test_images_that_the_factor_does_not_divide_are_refused(tiny):
    with pytest.raises(InputError, match="15x16 pixels, expected multiples of 2"):
        AutoencoderKL(tiny).encode(torch.rand(1, 3, 16, 15))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"block_out_channels": [100]}, "model.block_out_channels"),
        ({"block_out_channels": []}, "model.block_out_channels"),
        ({"latent_channels": 0}, "model.latent_channels"),
        ({"attention_levels": [4]}, "model.attention_levels"),
        ({"scaling_factor": 0.0}, "model.scaling_factor"),
    ],
)
def test_impossible_configurations_are_refused_by_name(change, key):
    with pytest.raises(InputError, match=key):
        AutoencoderConfig(**change)
