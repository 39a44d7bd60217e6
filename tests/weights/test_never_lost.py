"""What a command must not do to the files it is pointed at, and what it must not take for granted about them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_foreign
from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder, save_found
from vae.weights.bake import bake
from vae.weights.describe import warnings_of
from vae.weights.ldm import infer_config, to_ldm

CONFIG = AutoencoderConfig(block_out_channels=[32, 32])
SD_SHAPED = AutoencoderConfig(block_out_channels=[128, 256, 512, 512])
UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
    "cond_stage_model.x": torch.zeros(1),
}
State = dict[str, torch.Tensor]


@pytest.fixture
def model() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


def meta(config: AutoencoderConfig) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(config)


def _ldm(model: AutoencoderKL, prefix: str = "") -> State:
    return {prefix + n: t.clone() for n, t in to_ldm(dict(model.state_dict()), model.config).items()}


def test_a_full_checkpoint_is_never_overwritten_by_its_own_autoencoder(tmp_path, model):
    path = tmp_path / "full.safetensors"
    save_file(UNET | _ldm(model, "first_stage_model."), path)
    with pytest.raises(InputError, match="holds 2 tensors beside the autoencoder, which would be lost"):
        save_found(read_autoencoder(path), path)
    assert set(UNET) <= load_file(path).keys()


def test_a_folder_of_another_thing_is_never_made_an_autoencoders(tmp_path, model):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"name": "run", "model": {}}))
    with pytest.raises(InputError, match=r"its config\.json is another thing's and would be lost"):
        save_autoencoder(model, tmp_path / "run")


@pytest.mark.parametrize("stale", ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin"])
def test_a_folder_whose_older_weights_diffusers_would_prefer_is_refused(tmp_path, model, stale):
    (tmp_path / stale).write_text("{}")
    with pytest.raises(InputError, match="which diffusers may load instead"):
        save_autoencoder(model, tmp_path)


def test_weights_that_overflow_the_checkpoints_float16_are_not_baked(tmp_path, model):
    with torch.no_grad():
        model.decoder.conv_in.weight[0] = 1e5
    single = save_autoencoder(model, tmp_path / "m.safetensors", "ldm")
    save_file({n: t.half() for n, t in UNET.items()}, tmp_path / "full.safetensors")
    with pytest.raises(WeightsError, match=r"decoder\.conv_in\.weight exceeds float16"):
        bake(read_autoencoder(single), tmp_path / "full.safetensors", tmp_path / "new.safetensors")


def test_tensors_that_cannot_be_read_from_a_pickle_are_not_dropped_by_baking(tmp_path, model):
    single = save_autoencoder(model, tmp_path / "m.safetensors", "ldm")
    torch.save(UNET | {"model.diffusion_model.x": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "full.ckpt")
    with pytest.raises(WeightsError, match="of a kind that is not read from pickles"):
        bake(read_autoencoder(single), tmp_path / "full.ckpt", tmp_path / "new.safetensors")


def test_every_old_autoencoder_in_a_checkpoint_goes_and_the_familys_prefix_is_used(tmp_path, model):
    single = save_autoencoder(model, tmp_path / "m.safetensors", "ldm")
    save_file(UNET | _ldm(model, "vae.") | _ldm(model, "first_stage_model."), tmp_path / "full.safetensors")
    done = bake(read_autoencoder(single), tmp_path / "full.safetensors", tmp_path / "new.safetensors")
    assert done.prefix == "first_stage_model."
    assert not any(name.startswith("vae.") for name in load_file(tmp_path / "new.safetensors"))


def test_another_network_is_not_baked(tmp_path, model):
    other = AutoencoderKL(replace(CONFIG, block_out_channels=[32, 32, 32]))
    single = save_autoencoder(other, tmp_path / "m.safetensors", "ldm")
    save_file(UNET | _ldm(model, "first_stage_model."), tmp_path / "full.safetensors")
    with pytest.raises(WeightsError, match="another network than the autoencoder in"):
        bake(read_autoencoder(single), tmp_path / "full.safetensors", tmp_path / "new.safetensors")


def test_two_sets_of_weights_of_one_size_are_not_chosen_between(tmp_path, model):
    states = {key: {n: t + i for n, t in _ldm(model).items()} for i, key in enumerate(("ema", "model"))}
    torch.save(states, tmp_path / "both.pt")
    with pytest.raises(WeightsError, match=r"2 sets of weights of one size \(\['ema', 'model'\]\)"):
        read_autoencoder(tmp_path / "both.pt")


def test_the_configuration_beside_a_folders_file_is_read_with_it(tmp_path, model):
    save_autoencoder(AutoencoderKL(replace(CONFIG, scaling_factor=0.13025)), tmp_path)
    save_file(
        load_file(tmp_path / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.safetensors"
    )
    found = read_autoencoder(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.config.scaling_factor == 0.13025
    (tmp_path / "config.json").unlink()
    assert not read_autoencoder(tmp_path).stated


def test_a_scale_that_the_file_does_not_tell_is_called_assumed_also_after_conversion(tmp_path):
    save_file({n: t.half() for n, t in _ldm(AutoencoderKL(SD_SHAPED)).items()}, tmp_path / "foreign.safetensors")
    found = read_autoencoder(tmp_path / "foreign.safetensors")
    assert warnings_of(found) == [
        "the file does not tell whether it is of sd or sdxl: scaling_factor 0.18215 is assumed; --family says which"
    ]
    save_found(found, tmp_path / "converted.safetensors")
    converted = read_autoencoder(tmp_path / "converted.safetensors")
    assert warnings_of(converted) == warnings_of(found)
    assert warnings_of(converted, family="sdxl") == []
    told = converted.of_family("sdxl")
    save_found(told, tmp_path / "told.safetensors")
    assert read_autoencoder(tmp_path / "told.safetensors").config.scaling_factor == 0.13025
    assert warnings_of(read_autoencoder(tmp_path / "told.safetensors")) == []


def test_a_model_of_such_a_file_carries_that_and_what_is_saved_of_it_says_it_too(tmp_path):
    path = write_foreign(AutoencoderKL(replace(CONFIG, force_upcast=False)), tmp_path / "foreign.safetensors")
    model, told = load_autoencoder(path), load_autoencoder(path, family="sdxl")
    assert not model.config.scale_is_known
    assert (told.config.scaling_factor, told.config.scale_is_known) == (0.13025, True)
    with pytest.raises(InputError, match=r"family='flux', expected one of \['sd', 'sdxl'\] for this network"):
        load_autoencoder(path, family="flux")
    save_autoencoder(model, tmp_path / "again")
    assert not load_autoencoder(tmp_path / "again").config.scale_is_known
    assert "assumed, since the file they came from does not tell" in (tmp_path / "again" / "README.md").read_text()
    save_autoencoder(told, tmp_path / "again", notes=read_autoencoder(tmp_path / "again").notes)
    assert load_autoencoder(tmp_path / "again").config == told.config
    assert read_autoencoder(tmp_path / "again").scale_is_known
    assert "assumed" not in (tmp_path / "again" / "README.md").read_text()


def test_a_shape_that_one_family_alone_has_tells_the_scale(tmp_path):
    """The upscaler's, which no other has."""
    x4 = AutoencoderConfig(block_out_channels=[128, 256, 512], layers_per_block=1, mid_block_add_attention=False)
    state = {name: torch.zeros(()).expand(t.shape) for name, t in meta(x4).state_dict().items()}
    known, unknown = infer_config(tmp_path, state), infer_config(tmp_path, dict(AutoencoderKL(CONFIG).state_dict()))
    assert (known.scaling_factor, known.scale_is_known, unknown.scale_is_known) == (0.08333, True, False)


def test_a_family_that_is_named_leaves_nothing_of_another_scale(tmp_path, model):
    extra = {"edm_mean": torch.ones(1, 4, 1, 1), "edm_std": torch.full((1, 4, 1, 1), 8.0)}
    save_file(extra | _ldm(model, "first_stage_model."), tmp_path / "playground.safetensors")
    found = read_autoencoder(tmp_path / "playground.safetensors")
    assert (found.config.latents_std, found.scale_is_known) == ([8.0] * 4, True)
    assert found.of_family("sdxl").config == replace(CONFIG, scaling_factor=0.13025)


def test_playgrounds_own_normalisation_is_found_in_its_checkpoint(tmp_path, model):
    extra = {"edm_mean": torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), "edm_std": torch.full((1, 4, 1, 1), 2.0)}
    save_file(UNET | extra | _ldm(model, "first_stage_model."), tmp_path / "full.safetensors")
    config = read_autoencoder(tmp_path / "full.safetensors").config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (0.5, [1, 2, 3, 4], [2, 2, 2, 2])


def test_averages_beside_prefixed_weights_are_read_when_asked_for(tmp_path, model):
    shadow = {f"vae.model_ema.{n.replace('.', '')}": t + 1 for n, t in _ldm(model).items()}
    save_file(_ldm(model, "vae.") | shadow, tmp_path / "m.safetensors")
    found = read_autoencoder(tmp_path / "m.safetensors", ema=True)
    assert all(torch.equal(found.state[n], t + 1) for n, t in model.state_dict().items())


def test_eight_bit_weights_become_a_folder(tmp_path, model):
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in _ldm(model).items()}, tmp_path / "m.safetensors")
    save_found(read_autoencoder(tmp_path / "m.safetensors"), tmp_path / "folder", torch.float32)
    assert read_autoencoder(tmp_path / "folder").dtype is torch.float32
