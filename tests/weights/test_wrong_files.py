"""Files of other models, and autoencoders that are not what they are said to be: the refusal says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.ldm import to_ldm
from vae.weights.load import STEM

State = dict[str, torch.Tensor]

CONFIG = AutoencoderConfig(block_out_channels=[32, 64], layers_per_block=1)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(CONFIG)


def _tensors(*names: str) -> Callable[[State], State]:
    return lambda _: {name: torch.zeros(4, 4) for name in names}


SINGLE: dict[str, tuple[Callable[[State], State], str]] = {
    "an SDXL U-Net": (
        _tensors("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"),
        "looks like an SDXL diffusion model without a VAE",
    ),
    "an SDXL U-Net of diffusers": (
        _tensors("add_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
        "looks like a diffusion model in diffusers' layout",
    ),
    "a checkpoint of a run": (
        _tensors("autoencoder.decoder.conv_in.weight", "ema_model.decoder.conv_in.weight"),
        "looks like a checkpoint of a training run; vae export publishes its weights",
    ),
    "a checkpoint of a run of the first version": (
        _tensors("autoencoder.decoder.conv_in.weight", "average.decoder.conv_in.weight"),
        "looks like a checkpoint of a training run; vae export publishes its weights",
    ),
    "a FLUX transformer": (
        _tensors("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
        "looks like a FLUX diffusion model without a VAE",
    ),
    "a FLUX transformer of diffusers": (
        _tensors("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        "looks like a diffusion model in diffusers' layout",
    ),
    "an SD3 transformer": (
        _tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "model.diffusion_model.pos_embed"),
        "looks like an SD3 diffusion model without a VAE",
    ),
    "a CLIP text encoder": (
        _tensors("text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.final_layer_norm.weight"),
        "looks like a text encoder",
    ),
    "a T5 text encoder": (
        _tensors("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight", "shared.weight"),
        "looks like a text encoder",
    ),
    "a LoRA": (
        _tensors("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"),
        "looks like a LoRA",
    ),
    "a LoRA of diffusers": (
        _tensors("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        "looks like a LoRA",
    ),
    "TAESD of diffusers": (
        _tensors("decoder.layers.0.weight", "encoder.layers.0.weight"),
        "2 tensors of a tiny autoencoder .* that are not a whole one; is it one half",
    ),
    "TAESD's own file": (_tensors("1.weight", "3.conv.0.weight"), "one half of a tiny autoencoder; name the two"),
    "an encoder alone": (
        lambda s: {name: tensor for name, tensor in s.items() if name.startswith("encoder.")},
        "an encoder alone; the whole autoencoder is needed",
    ),
    "a decoder alone": (
        lambda s: {name: tensor for name, tensor in s.items() if name.startswith("decoder.")},
        "not a complete autoencoder, .* is missing .*; is it one half of one",
    ),
    "integer weights": (
        lambda s: {name: (100 * tensor).to(torch.int8) for name, tensor in s.items()},
        "is torch.int8, expected floating-point weights",
    ),
    "a VQ model": (
        lambda s: s | {"quantize.embedding.weight": torch.zeros(16, 4)},
        r"1 unknown \(first \['quantize.embedding.weight'\]\) .* check that it is a complete AutoencoderKL",
    ),
    "groups that the widths do not tell": (
        lambda s: {name: torch.zeros(24, *t.shape[1:]) if t.shape[0] == 32 else t for name, t in s.items()},
        "its widths do not tell the number of groups .* load it with its config.json",
    ),
}


@pytest.mark.parametrize(("make", "message"), SINGLE.values(), ids=SINGLE.keys())
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_is_no_kl_autoencoder_is_refused_with_what_it_is(tmp_path, model, make, message, suffix):
    ldm = {name: tensor.contiguous() for name, tensor in to_ldm(dict(model.state_dict()), CONFIG).items()}
    path = tmp_path / f"wrong.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(make(ldm), path)
    _assert_refused(path, path, message)


FOLDER: dict[str, tuple[Callable[[State], State], str]] = {
    "transposed weights": (
        lambda s: {name: t.transpose(0, 1).contiguous() if t.ndim == 4 else t for name, t in s.items()},
        r"is \(.*\), expected \(.*\); it is of another architecture",
    ),
    "half of the keys": (
        lambda s: dict(list(s.items())[::2]),
        r"\d+ keys missing \(first \[.*\]\) and 0 unknown .*; check that it is a complete AutoencoderKL",
    ),
    "the keys of a deeper network": (
        lambda s: dict(AutoencoderKL(AutoencoderConfig(block_out_channels=[32, 64])).state_dict()),
        r"0 keys missing .* and \d+ unknown \(first \['decoder.up_blocks.0.resnets.2",
    ),
    "other widths": (
        lambda s: dict(AutoencoderKL(AutoencoderConfig(block_out_channels=[64, 64], layers_per_block=1)).state_dict()),
        r"of another architecture|unknown",
    ),
    "sixteen channels where four are stated": (
        lambda s: dict(AutoencoderKL(_with_latents(16)).state_dict()),
        r"is \(.*16.*\), expected \(.*4.*\); it is of another architecture",
    ),
    "an empty tensor": (
        lambda s: s | {"encoder.conv_in.weight": torch.zeros(0)},
        r"encoder.conv_in.weight is \(0,\), expected \(32, 3, 3, 3\); it is of another architecture",
    ),
    "integer weights": (
        lambda s: s | {"encoder.conv_in.weight": s["encoder.conv_in.weight"].to(torch.int8)},
        "encoder.conv_in.weight is torch.int8, expected floating-point weights",
    ),
    "values that are not finite": (
        lambda s: s | {"encoder.conv_in.bias": torch.full((32,), -torch.inf)},
        r"1 tensors hold NaN or infinite values \(first \['encoder.conv_in.bias'\]\); .* use an earlier file",
    ),
}


@pytest.mark.parametrize(("make", "message"), FOLDER.values(), ids=FOLDER.keys())
def test_weights_that_are_not_those_of_their_configuration_are_refused(tmp_path, model, make, message):
    folder = save_autoencoder(model, tmp_path / "folder")
    path = folder / f"{STEM}.safetensors"
    save_file(make({name: tensor.clone() for name, tensor in model.state_dict().items()}), path)
    _assert_refused(folder, path, message)


def test_the_untouched_files_load(tmp_path, model):
    for path in (
        save_autoencoder(model, tmp_path / "m.vae.safetensors", "ldm"),
        save_autoencoder(model, tmp_path / "folder"),
    ):
        assert load_autoencoder(path).config == CONFIG


def _with_latents(channels: int) -> AutoencoderConfig:
    return AutoencoderConfig(block_out_channels=[32, 64], layers_per_block=1, latent_channels=channels)


def _assert_refused(given: Path, named: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        load_autoencoder(given)
    assert str(named) in str(error.value)
    assert str(error.value).isprintable()
