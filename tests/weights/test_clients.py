"""What is said about an autoencoder before it is handed over."""

from dataclasses import replace

import pytest
from safetensors import safe_open

from tests.presets import preset
from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder
from vae.weights.describe import clients_of, title_of, warnings_about
from vae.weights.ldm import from_ldm, to_ldm
from vae.weights.loaded import Notes, to_metadata

EVERYONE = {"diffusers", "ComfyUI", "A1111", "Forge", "SD.Next", "kohya sd-scripts"}
FOLDER = "kohya sd-scripts (folder)"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_familys_own_network_and_scale_need_no_warning(name):
    assert set(clients_of(preset(name))) == EVERYONE - ({"A1111"} if name == "flux" else set())
    assert warnings_about(preset(name)) == []


@pytest.mark.parametrize(
    ("config", "clients"),
    [
        (preset("kl_f4"), {"diffusers", "ComfyUI", FOLDER}),
        (replace(preset("kl_f4"), latent_channels=4), {"diffusers", "ComfyUI", "Forge", FOLDER}),
        (preset("kl_f16"), {"diffusers", FOLDER}),
        (preset("tiny"), {"diffusers", FOLDER}),
        (replace(preset("flux"), use_quant_conv=True, use_post_quant_conv=True), {"diffusers", "ComfyUI", FOLDER}),
        (replace(preset("sd"), latent_channels=8), {"diffusers", "ComfyUI", FOLDER}),
        (replace(preset("sd"), latent_channels=64), {"diffusers", FOLDER}),
        (replace(preset("sd"), mid_block_add_attention=False), {"diffusers", FOLDER}),
        (replace(preset("sd"), in_channels=4, out_channels=4), {"diffusers", FOLDER}),
    ],
)
def test_a_network_that_few_programs_can_hold_is_said_to_be_so(config, clients):
    assert set(clients_of(config)) == clients
    (warning,) = [line for line in warnings_about(config) if "can load it" in line]
    assert all(name in warning for name in clients)


def test_a_scale_that_no_family_has_is_said_to_be_ignored_by_web_uis():
    (warning,) = warnings_about(replace(preset("sd"), scaling_factor=0.24))
    assert "web UIs and ComfyUI will use 0.18215 (sd) or 0.13025 (sdxl), not scaling_factor 0.24" in warning


def test_sdxls_scale_is_wrong_beside_an_sd_diffusion_model():
    assert warnings_about(preset("sdxl"), family="sdxl") == []
    (warning,) = warnings_about(preset("sdxl"), family="sd")
    assert "will use 0.18215 (sd)" in warning


def test_a_flux_autoencoder_without_a_shift_is_said_to_fail_in_its_pipelines():
    (warning,) = warnings_about(replace(preset("flux"), shift_factor=None))
    assert "need a shift_factor" in warning


def test_sd_networks_without_quant_convolutions_get_identities_that_go_away_again():
    config = AutoencoderConfig(
        block_out_channels=[8], norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False
    )
    state = to_ldm(dict(AutoencoderKL(config).state_dict()), config)
    assert tuple(state["quant_conv.weight"].shape) == (8, 8, 1, 1)
    assert tuple(state["post_quant_conv.weight"].shape) == (4, 4, 1, 1)
    assert from_ldm(state, config).keys() == AutoencoderKL(config).state_dict().keys()
    state["quant_conv.weight"][0, 1] = 0.5
    assert "quant_conv.weight" in from_ldm(state, config)
    wide = replace(config, latent_channels=16)
    assert not any("quant_conv" in name for name in to_ldm(dict(AutoencoderKL(wide).state_dict()), wide))


def test_metadata_holds_version_configuration_scale_and_what_was_measured(tmp_path, tiny):
    notes = Notes(latents={"latents_mean": [0.1, 0.2, 0.3]}, training={"updates": 7})
    path = save_autoencoder(AutoencoderKL(tiny), tmp_path / "m.safetensors", "ldm", notes=notes)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata == {"format": "pt"} | to_metadata(tiny, notes)
    assert set(metadata) == {
        "format",
        "vae.format_version",
        "vae.config",
        "vae.config_sha256",
        "vae.scaling_factor",
        "vae.shift_factor",
        "vae.latents",
        "vae.training",
    }
    assert read_autoencoder(path).notes == notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae.format_version": "2"}, "format version 2, this vae reads 1; update vae"),
        ({"vae.config": '{"latent_channels": 4}'}, "not the one its checksum was made of"),
        ({"vae.config": "[]", "vae.config_sha256": None}, "is not a JSON object"),
        ({"vae.config": '{"latent_channels": "4"}', "vae.config_sha256": None}, "latent_channels='4'"),
        ({"vae.latents": "{"}, "vae.latents is not readable as JSON"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(tmp_path, tiny, change, message):
    from safetensors.torch import load_file, save_file

    path = save_autoencoder(AutoencoderKL(tiny), tmp_path / "m.safetensors", "ldm")
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() | change).items() if value is not None}
    save_file(load_file(path), path, metadata)
    with pytest.raises(WeightsError, match=message):
        read_autoencoder(path)


def test_a_title_names_the_family_only_as_far_as_the_file_tells(tmp_path):
    config = preset("sd3")
    path = save_autoencoder(AutoencoderKL(config), tmp_path / "m.safetensors", "ldm")
    assert title_of(read_autoencoder(path)) == "AutoencoderKL f8c16, of the family of SD3"
