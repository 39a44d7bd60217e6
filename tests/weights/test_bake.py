"""An autoencoder into a full checkpoint and out again."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder
from vae.weights.bake import bake
from vae.weights.ldm import to_ldm
from vae.weights.safetensors_io import read_index

SD_SHAPED = AutoencoderConfig(block_out_channels=[32, 32])
UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
}
TEXT = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}


@pytest.fixture
def model() -> AutoencoderKL:
    return AutoencoderKL(SD_SHAPED)


def _diffusion_model(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    state = {name: torch.randn(shape).to(dtype) for name, shape in UNET.items()}
    return state | {name: torch.arange(77).reshape(shape) for name, shape in TEXT.items()}


def _old_vae() -> dict[str, torch.Tensor]:
    state = to_ldm(dict(AutoencoderKL(SD_SHAPED).state_dict()), SD_SHAPED)
    return {f"first_stage_model.{name}": tensor.half().contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("with_old", [True, False], ids=["with an autoencoder", "without one"])
def test_everything_else_is_kept_and_nothing_of_the_old_one_is(tmp_path, model, suffix, with_old):
    stale = _old_vae() | {"first_stage_model.loss.logvar": torch.zeros(1)} if with_old else {}
    full = _diffusion_model() | stale
    checkpoint = tmp_path / f"full.{suffix}"
    save_file(full, checkpoint, {"modelspec.title": "kept"}) if suffix == "safetensors" else torch.save(
        full, checkpoint
    )
    single = save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm")
    done = bake(read_autoencoder(single), checkpoint, tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    expected = to_ldm(dict(model.state_dict()), SD_SHAPED)
    assert {name for name in new if name.startswith("first_stage_model.")} == {
        f"first_stage_model.{n}" for n in expected
    }
    assert all(torch.equal(new[f"first_stage_model.{name}"], tensor.half()) for name, tensor in expected.items())
    assert all(torch.equal(new[name], full[name]) for name in (*UNET, *TEXT))
    assert (done.kept, done.replaced, done.family) == (3, len(stale), "sd")
    if suffix == "safetensors":
        assert read_index(tmp_path / "new.safetensors").metadata["modelspec.title"] == "kept"


def test_a_flux_checkpoint_gets_its_autoencoder_under_its_own_prefix(tmp_path):
    config = AutoencoderConfig(
        latent_channels=16,
        block_out_channels=[32, 32],
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )
    single = save_autoencoder(AutoencoderKL(config), tmp_path / "ae.safetensors", "ldm")
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "f.safetensors")
    assert bake(read_autoencoder(single), tmp_path / "f.safetensors", tmp_path / "new.safetensors").prefix == "vae."
    assert read_autoencoder(tmp_path / "new.safetensors").family == "flux"


def test_an_upscalers_checkpoint_without_an_autoencoder_has_a_place_for_one(tmp_path, model):
    single = save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm")
    save_file(_diffusion_model() | {"low_scale_model.betas": torch.zeros(1)}, tmp_path / "full.safetensors")
    done = bake(read_autoencoder(single), tmp_path / "full.safetensors", tmp_path / "new.safetensors")
    assert (done.family, done.prefix) == ("x4", "first_stage_model.")


@pytest.mark.parametrize(
    ("checkpoint", "target", "message"),
    [
        ({"some.weight": torch.zeros(1)}, "new.safetensors", "where the autoencoder belongs cannot be told"),
        ({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, "new.safetensors", "an autoencoder by itself"),
        ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "new.safetensors", "works on 16"),
        (UNET, "new.ckpt", "never a pickle"),
    ],
)
def test_what_cannot_be_baked_is_refused_and_nothing_written(tmp_path, model, checkpoint, target, message):
    checkpoint = _diffusion_model() if checkpoint is UNET else checkpoint
    save_file(checkpoint, tmp_path / "full.safetensors")
    single = save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm")
    before = set(tmp_path.iterdir())
    with pytest.raises(WeightsError, match=message):
        bake(read_autoencoder(single), tmp_path / "full.safetensors", tmp_path / target)
    assert set(tmp_path.iterdir()) == before
