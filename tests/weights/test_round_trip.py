"""Out and back again without the loss of a bit, for any network; and diffusers as the authority on the single file."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Authority
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.presets import AT_FULL_SIZE, preset
from vae.config.model import AutoencoderConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder
from vae.weights.ldm import to_ldm
from vae.weights.loaded import Notes

GROUPS = 4
ATTENTION_IN_LEVELS = ("kl_f16", "kl_f32")  # which diffusers' conversion of single files does not know


@st.composite
def configurations(draw: st.DrawFn) -> AutoencoderConfig:
    levels = draw(st.integers(1, 5))
    channels = draw(st.sampled_from([1, 3, 4]))
    return AutoencoderConfig(
        in_channels=channels,
        out_channels=channels,
        latent_channels=draw(st.sampled_from([1, 3, 4, 16])),
        block_out_channels=[GROUPS * draw(st.integers(1, 3)) for _ in range(levels)],
        layers_per_block=draw(st.integers(1, 3)),
        norm_num_groups=GROUPS,
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
        mid_block_add_attention=draw(st.booleans()),
        attention_levels=sorted(draw(st.sets(st.integers(0, levels - 1), max_size=2))),
        scaling_factor=draw(st.floats(0.01, 10.0)),
        shift_factor=draw(st.none() | st.floats(-1.0, 1.0)),
        force_upcast=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    config=configurations(), notes=st.builds(Notes, latents=st.just({"mean": 0.5}), training=st.just({"updates": 3}))
)
def test_any_network_survives_both_layouts_bit_for_bit(config: AutoencoderConfig, notes: Notes) -> None:
    model = AutoencoderKL(config)
    with TemporaryDirectory() as folder:
        for format, name in (("ldm", "m.vae.safetensors"), ("diffusers", "folder")):
            path = save_autoencoder(model, Path(folder) / name, format, notes=notes)
            found = read_autoencoder(path)
            assert found.config == config
            assert found.notes == notes
            _assert_same(found.state, dict(model.state_dict()))


@st.composite
def networks(draw: st.DrawFn) -> AutoencoderConfig:
    """Such as nothing states: in groups of 32, with quant convolutions where SD's four channels are."""
    levels, latent = draw(st.integers(1, 4)), draw(st.sampled_from([3, 4, 8, 16]))
    has_quant = latent == 4 or draw(st.booleans())
    return AutoencoderConfig(
        in_channels=3,
        latent_channels=latent,
        block_out_channels=[32 * draw(st.integers(1, 2)) for _ in range(levels)],
        layers_per_block=draw(st.integers(1, 3)),
        use_quant_conv=has_quant,
        use_post_quant_conv=has_quant,
        mid_block_add_attention=draw(st.booleans()),
        attention_levels=sorted(draw(st.sets(st.integers(0, levels - 1), max_size=1))),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(config=networks(), layout=st.sampled_from(["ldm", "diffusers"]))
def test_any_networks_architecture_is_read_from_its_tensors(config: AutoencoderConfig, layout: str) -> None:
    state = dict(AutoencoderKL(config).state_dict())
    named = to_ldm(state, config) if layout == "ldm" else state
    with TemporaryDirectory() as folder:
        save_file({name: tensor.clone() for name, tensor in named.items()}, Path(folder) / "m.safetensors")
        found = read_autoencoder(Path(folder) / "m.safetensors")
    assert found.layout == layout or not config.mid_block_add_attention
    assert replace(found.config, scaling_factor=1.0, shift_factor=None) == replace(config, scaling_factor=1.0)
    _assert_same(found.state, state)


@pytest.mark.parametrize("name", AT_FULL_SIZE)
def test_every_preset_survives_both_layouts_and_loads_in_diffusers_with_strict_keys(tmp_path, perturbed, name):
    """At full size: our folder by `from_pretrained`, our single file by `from_single_file`, images as ours."""
    config = preset(name)
    model = perturbed(config)
    single = save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm")
    folder = save_autoencoder(model, tmp_path / "folder")
    for path in (single, folder):
        _assert_same(dict(load_autoencoder(path).state_dict()), dict(model.state_dict()))
    theirs, report = cast(Any, Authority).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.scaling_factor == config.scaling_factor
    _assert_same_images(theirs, model)
    if name not in ATTENTION_IN_LEVELS:
        del theirs
        theirs = cast(Any, Authority).from_single_file(str(single), config=str(folder))
        _assert_same({key: tensor for key, tensor in theirs.state_dict().items()}, dict(model.state_dict()))
        _assert_same_images(theirs, model)


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def _assert_same_images(theirs: Any, model: AutoencoderKL) -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = model.encode(images).mode()
    torch.testing.assert_close(theirs.encode(images).latent_dist.mode(), latents, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(latents).sample, model.decode(latents), atol=2e-5, rtol=1e-5)
