"""Tiny autoencoders on disk: diffusers' folder, the published pair, ComfyUI's one file; and what cannot be one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Authority
from safetensors.torch import load_file, save_file

from tests.presets import TINY, TINY_PRESETS, preset
from vae.config.model import AutoencoderConfig
from vae.errors import InputError
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.models.base import Autoencoder
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder, save_found
from vae.weights.bake import bake
from vae.weights.describe import clients_of, title_of, warnings_of
from vae.weights.formats import from_diffusers_config, to_diffusers_config
from vae.weights.loaded import Notes

REAL = Path(__file__).resolve().parents[3] / "shared" / "weights"
IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
State = dict[str, torch.Tensor]


def same(ours: Autoencoder | State, expected: Autoencoder | State) -> bool:
    a, b = (one.state_dict() if isinstance(one, Autoencoder) else one for one in (ours, expected))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def published(model: Autoencoder, folder: Path, name: str = "mine", write: Any = torch.save) -> Path:
    """The pair as TAESD's author writes it: Sequentials without a word; returns the decoder."""
    ours = cast(Any, model)
    decoder = torch.nn.Sequential(torch.nn.Identity(), *ours.decoder.layers)
    for half, layers in {"encoder": ours.encoder.layers, "decoder": decoder}.items():
        write(dict(layers.state_dict()), folder / f"{name}_{half}.pth")
    return folder / f"{name}_decoder.pth"


@pytest.mark.parametrize("channels", [4, 16])
def test_a_folder_of_diffusers_loads_and_ours_loads_there(tmp_path, channels):
    theirs = cast(Any, Authority.from_config(to_diffusers_config(TINY(latent_channels=channels))))  # untyped upstream
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(tmp_path / "theirs")
    assert (ours.config, same(ours, theirs.state_dict())) == (TINY(latent_channels=channels), True)
    save_autoencoder(ours, tmp_path / "ours")
    again, report = cast(Any, Authority).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    fields = to_diffusers_config(ours.config).keys() - {"_class_name", "_diffusers_version"}
    assert {name: again.config[name] for name in fields} == {name: theirs.config[name] for name in fields}
    with torch.no_grad():
        latents = ours.encode(IMAGES).mode()
        torch.testing.assert_close(again.encode(IMAGES).latents, latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.decode(latents).sample, ours.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", [False, True])
def test_pair_and_single_file_and_folder_hold_the_same_bits(tmp_path, pool):
    model = AutoencoderTiny(TINY(mid_block_pool=pool))
    found = read_autoencoder(published(model, tmp_path))
    assert (found.config, found.layout, found.others) == (model.config, "taesd", 0)
    for name in ("one.safetensors", "pair_encoder.safetensors", *(() if pool else ("folder",))):
        found = read_autoencoder(tmp_path / name) if save_found(found, tmp_path / name) else found
        assert same(found.state, model)
        assert found.config == model.config
    assert same(load_file(tmp_path / "pair_encoder.safetensors"), torch.load(tmp_path / "mine_encoder.pth"))
    assert same(load_file(tmp_path / "pair_decoder.safetensors"), torch.load(tmp_path / "mine_decoder.pth"))
    assert same(load_autoencoder(tmp_path / "mine_encoder.pth"), model)


def test_a_folder_of_one_pair_means_that_and_of_two_neither(tmp_path):
    model = AutoencoderTiny(TINY())
    published(model, tmp_path)
    (tmp_path / "lonely_decoder.pth").write_bytes(b"not looked at")
    assert same(load_autoencoder(tmp_path), model)
    published(model, tmp_path, "other")
    with pytest.raises(WeightsError, match=r"2 tiny autoencoders, name the file of one, as mine_decoder\.pth"):
        load_autoencoder(tmp_path)


def test_comfyui_finds_its_names_and_the_scale_of_the_family(tmp_path):
    found = read_autoencoder(published(AutoencoderTiny(TINY()), tmp_path, "taesdxl"))
    assert found.family == "sdxl"
    save_found(found, tmp_path / "one.safetensors", torch.float16)
    written = load_file(tmp_path / "one.safetensors")
    assert {name for name in written if not name.startswith(("taesd_encoder.", "taesd_decoder."))} == {
        "vae_scale",
        "vae_shift",
    }
    assert torch.equal(written["taesd_decoder.1.weight"], found.state["decoder.layers.0.weight"].half())
    assert torch.equal(written["vae_scale"], torch.tensor(0.13025))
    again = read_autoencoder(tmp_path / "one.safetensors")
    assert (again.family, again.others, again.config.scaling_factor) == ("sdxl", 0, 1.0)
    assert title_of(again) == "AutoencoderTiny f8c4, for the latents of SDXL"


@pytest.mark.parametrize(("stated", "family"), [("sdxl", "sdxl"), ("mine", None), (["sd"], None)])
def test_a_folder_tells_the_family_that_its_run_knew(tmp_path, stated, family):
    notes = Notes(training={"family": stated})
    found = read_autoencoder(save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "folder", notes=notes))
    assert found.family == family
    save_found(found, tmp_path / "one.safetensors")
    assert ("vae_scale" in load_file(tmp_path / "one.safetensors")) == (family is not None)


def test_the_family_of_anothers_file_is_asked_for_and_changes_no_scale(tmp_path):
    save_file({name: t.clone() for name, t in AutoencoderTiny(preset("taesd")).state_dict().items()}, tmp_path / "m.st")
    found = read_autoencoder(tmp_path / "m.st")
    assert replace(found.config, sample_size=512) == preset("taesd")
    assert "does not tell (sd or sdxl)" in warnings_of(found)[0]
    named = found.of_family("sd")
    assert (named.config, named.family, warnings_of(named)) == (found.config, "sd", [])


def test_eight_bit_weights_are_read(tmp_path):
    state = AutoencoderTiny(TINY()).state_dict()
    small = {n: t.to(torch.float8_e4m3fn) if n.endswith("weight") else t.clone() for n, t in state.items()}
    save_file(small, tmp_path / "small.safetensors")
    assert same(load_autoencoder(tmp_path / "small.safetensors"), {name: t.float() for name, t in small.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu', which is not supported, expected 'relu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn is 'bilinear'"),
        ({"num_encoder_blocks": [2, 3, 3, 3]}, r"num_encoder_blocks is \[2, 3, 3, 3\], .* expected \[1, 3, 3, 3\]"),
        ({"num_decoder_blocks": [1, 3, 3, 3]}, "num_decoder_blocks is"),
        ({"num_encoder_blocks": 3}, "config.json"),
        ({"decoder_block_out_channels": [8, 8, 8, 16]}, "decoder_block_out_channels is"),
        ({"encoder_block_out_channels": "wide"}, "model.block_out_channels=wide, expected 1 to 12"),
        ({"latent_channels": "4"}, "model.latent_channels='4'"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_with_the_reason(tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        from_diffusers_config(to_diffusers_config(TINY()) | change, tmp_path / "config.json")


def test_what_diffusers_has_no_field_for_is_not_written_there(tmp_path):
    with pytest.raises(WeightsError, match=r"has no mid_block_pool; write one file, NAME.safetensors"):
        save_autoencoder(AutoencoderTiny(TINY(mid_block_pool=True)), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="has no latents_mean"):
        to_diffusers_config(TINY(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))


def test_the_two_new_fields_are_in_no_kl_configuration_and_old_ones_need_none(tmp_path, tiny):
    values = to_diffusers_config(tiny)
    assert not {"architecture", "mid_block_pool"} & values.keys()
    assert from_diffusers_config(values | {"architecture": "tiny"}, tmp_path) == tiny
    assert AutoencoderConfig() == AutoencoderConfig(architecture="kl", mid_block_pool=False)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_alone_is_refused_with_the_name_of_the_other(tmp_path, half):
    published(AutoencoderTiny(TINY()), tmp_path)
    path, other = (tmp_path / f"mine_{one}.pth" for one in (half, {"encoder": "decoder", "decoder": "encoder"}[half]))
    other.unlink()
    with pytest.raises(WeightsError, match=f"put the other, {other.name}, beside it"):
        load_autoencoder(path)
    path.rename(tmp_path / "half.pth")
    with pytest.raises(WeightsError, match="name the two NAME_encoder and NAME_decoder"):
        load_autoencoder(tmp_path / "half.pth")


def test_damaged_tensors_are_named(tmp_path):
    path = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "m.safetensors", "taesd")
    state = load_file(path)
    for change, message in {
        "taesd_decoder.1.weight": "this looks like a part of a tiny autoencoder",
        "taesd_decoder.19.weight": r"1 keys missing \(first \['decoder.layers.18.weight'\]\)",
        "taesd_encoder.5.conv.2.bias": r"1 keys missing \(first \['encoder.layers.5.conv.2.bias'\]\)",
    }.items():
        save_file({name: tensor for name, tensor in state.items() if name != change}, path)
        with pytest.raises(WeightsError, match=message):
            load_autoencoder(path)
    save_file(state | {"taesd_encoder.99.bias": torch.zeros(1), "extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"and 2 unknown .* a complete AutoencoderTiny"):
        load_autoencoder(path)


def test_each_architecture_has_its_own_single_file(tmp_path, tiny):
    with pytest.raises(InputError, match="format='ldm', expected 'diffusers' or 'taesd' for this architecture"):
        save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "m.safetensors", "ldm")
    with pytest.raises(InputError, match="format='taesd', expected 'diffusers' or 'ldm'"):
        save_autoencoder(AutoencoderKL(tiny), tmp_path / "m.safetensors", "taesd")
    path = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "t.safetensors", "taesd")
    with pytest.raises(
        WeightsError, match="its tensors are of architecture tiny, but the configuration is of architecture kl"
    ):
        load_autoencoder(path, config=tiny)
    kl = save_autoencoder(AutoencoderKL(tiny), tmp_path / "kl.safetensors", "ldm")
    with pytest.raises(
        WeightsError, match="its tensors are of architecture kl, but the configuration is of architecture tiny"
    ):
        load_autoencoder(kl, config=TINY())
    with pytest.raises(WeightsError, match="without EMA weights"):
        load_autoencoder(path, ema=True)
    with pytest.raises(WeightsError, match="a tiny autoencoder, which no checkpoint has a place for"):
        bake(read_autoencoder(path), kl, tmp_path / "baked.safetensors")


def test_what_programs_load_it_is_said():
    assert clients_of(preset("taesd")) == ["diffusers", "ComfyUI"]
    assert clients_of(TINY()) == ["diffusers"]
    assert clients_of(TINY(mid_block_pool=True)) == []


@pytest.mark.skipif(not REAL.is_dir(), reason="no published weights beside the repository")
@pytest.mark.parametrize("name", TINY_PRESETS)
def test_published_weights_are_of_the_presets(name):
    file = {"taesd": "taesd_sdxl_encdec_fp8.safetensors", "taesd3": "taesd_flux1_encdec_fp8.safetensors"}
    found = read_autoencoder(REAL / file.get(name, "taef2_decoder.pth"))
    assert replace(found.config, sample_size=512) == preset(name)
