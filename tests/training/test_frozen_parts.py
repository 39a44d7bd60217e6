"""Fine-tuning a part of a published autoencoder: where its weights come from, what learns, what is computed."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import read_json, without_adversary
from tests.training.images import noise, on, save
from tests.training.test_train import _columns
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder
from vae.training.export import export_checkpoint
from vae.training.initialise import initial_state, load_initial_weights
from vae.training.manifest import newest_whole
from vae.training.module import AutoencoderModule
from vae.training.step import single_pass
from vae.training.train import train
from vae.weights import load_autoencoder, save_autoencoder
from vae.weights.ldm import to_ldm
from vae.weights.load import find_export

ENCODING = ["encoder", "quant_conv"]


@pytest.fixture
def base(tmp_path: Path, tiny: AutoencoderConfig, perturbed: Callable[..., AutoencoderKL]) -> Path:
    """A published model, some of whose weights are negative zeros."""
    model = perturbed(replace(tiny, scaling_factor=0.7))
    with torch.no_grad():
        model.encoder.conv_in.weight[0] = -0.0
    return save_autoencoder(model, tmp_path / "base")


@pytest.fixture
def decoder_only(tmp_path: Path, tiny_run: TrainConfig, base: Path) -> TrainConfig:
    """Four updates on six images of just the size, of which nothing has to be cut."""
    for number in range(6):
        save(tmp_path / "images" / "train", f"{number}.png", noise(32, 32, number))
    save(tmp_path / "images" / "val", "a.png", noise(32, 32, 99))
    run = on(tiny_run, tmp_path / "images", crop_scale=[1.0, 1.0], flip=False)
    return replace(run, init=str(base), frozen=ENCODING, model=AutoencoderConfig(), updates=4)


def _bits(model: Autoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int32) for name, tensor in model.state_dict().items()}


def test_a_frozen_encoder_is_published_bit_for_bit_with_its_scale_and_the_decoder_has_learned(decoder_only, base):
    run = train(decoder_only)
    before = load_autoencoder(base)
    again, _ = export_checkpoint(run, newest_whole(run / "checkpoints")[0], torch.device("cpu"))
    for path in (*(run / "exports" / "step_0000004").iterdir(), *again):
        after = load_autoencoder(path)
        changed = {name for name, bits in _bits(after).items() if not torch.equal(bits, _bits(before)[name])}
        assert changed == {name for name in before.state_dict() if name.startswith(("decoder", "post_quant_conv"))}
        assert after.config.scaling_factor == 0.7
    written = read_json(run / "config.json")
    assert (written["init"], written["model"]) == (str(base), asdict(before.config))
    assert "train/pixel" in _columns(run)
    assert "train/kl" not in _columns(run)


def test_the_moments_of_frozen_parts_take_no_memory(decoder_only):
    run = train(replace(without_adversary(decoder_only), frozen=[*ENCODING, "decoder.up_blocks.0"]))
    kept = torch.load(newest_whole(run / "checkpoints")[0], weights_only=True)["optimizer_states"][0]["state"]
    decoder = load_autoencoder(run / "exports" / "best" / "diffusers").decoder
    assert len(kept) == len(list(decoder.parameters())) - len(list(decoder.up_blocks[0].parameters())) + 2


class Cost:
    """Of one training step: FLOPs of convolutions in forward and backward, bytes that the autoencoder keeps between."""

    def __init__(self, training: AutoencoderModule, moments: torch.Tensor | None = None) -> None:
        kept: list[int] = []
        images = torch.rand(2, 3, 32, 32) * 2 - 1

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        def autoencode(images: torch.Tensor) -> Any:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                return training.autoencoding([0, 1], images, moments)

        with FlopCounterMode(display=False) as counter:
            loss, _ = single_pass(images, autoencode, training.objective, None, 0)
            loss.backward()
        counts = counter.get_flop_counts()["Global"]
        self.forward = counts[torch.ops.aten.convolution]
        self.backward = counts[torch.ops.aten.convolution_backward]
        self.kept = sum(kept)


def test_a_frozen_encoder_has_no_backward_and_keeps_nothing_and_with_known_moments_it_is_not_run(tiny_run):
    config = without_adversary(tiny_run)
    whole, part = AutoencoderModule(config), AutoencoderModule(replace(config, frozen=ENCODING))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        posterior = part.autoencoder.encode(torch.zeros(2, 3, 32, 32))
    encoding = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    full, live = Cost(whole), Cost(part)
    cached = Cost(part, torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert full.forward == live.forward == cached.forward + encoding
    assert full.backward > live.backward + encoding
    assert live.backward == cached.backward
    assert full.kept > 1.5 * live.kept
    assert live.kept == cached.kept
    assert all(parameter.grad is None for parameter in part.autoencoder.encoder.parameters())


def test_what_is_decoded_is_the_mean_where_that_is_asked_for(tiny_run):
    images = torch.rand(2, 3, 32, 32)
    decoded = {}
    for latents in ("sampled", "mean"):
        torch.manual_seed(0)
        training = AutoencoderModule(replace(tiny_run, latents=latents))
        posterior, _, decoded[latents], _ = training.autoencoding([4, 5], images)
    expected = training.autoencoder.decode(posterior.mode())  # pyright: ignore[reportPossiblyUnbound]
    assert torch.equal(decoded["mean"], expected)
    assert not torch.allclose(decoded["sampled"], expected)


@pytest.mark.parametrize("kind", ["folder", "file", "half", "run"])
def test_a_run_begins_from_whatever_holds_an_autoencoder(tmp_path, base, tiny_run, kind):
    model, path = load_autoencoder(base), base
    if kind == "file":
        path = save_autoencoder(model, tmp_path / "one.vae.safetensors", "ldm")
    elif kind == "half":
        path = save_autoencoder(model, tmp_path / "half", dtype=torch.float16)
    elif kind == "run":
        path = tmp_path / "made"
        save_autoencoder(model, path / "exports" / "step_0000004" / "diffusers")
    config = replace(tiny_run, init=str(path), model=AutoencoderConfig())
    start = initial_state(config, tmp_path / "run")
    assert start.config.model == model.config
    training = load_initial_weights(start, AutoencoderModule(start.config))
    expected = load_autoencoder(find_export(path)).state_dict()
    for network in (training.autoencoder, training.ema_model):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in training.ema_model.parameters())


def test_a_file_that_does_not_tell_its_scale_has_the_one_that_is_stated(tmp_path, tiny_run):
    shape = AutoencoderConfig(block_out_channels=[32, 64], layers_per_block=1, mid_block_add_attention=False)
    state = to_ldm(AutoencoderKL(shape).state_dict(), shape)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "other.safetensors")
    config = replace(tiny_run, init=str(tmp_path / "other.safetensors"))
    guessed = initial_state(replace(config, model=AutoencoderConfig()), tmp_path)
    stated = initial_state(replace(config, model=replace(shape, scaling_factor=0.13025)), tmp_path)
    assert "does not tell its scaling factor: 0.18215 is taken" in guessed.notes[0]
    assert "does not tell norm_num_groups: 32 is taken" in guessed.notes[1]
    assert (stated.config.model.scaling_factor, stated.notes) == (0.13025, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen": ["encodr"]}, r"frozen='encodr', expected a module of the autoencoder; did you mean 'encoder'\?"),
        ({"frozen": ["decoder.up_blocks.7"]}, r"frozen='decoder.up_blocks.7', .* did you mean 'decoder.up_blocks.\d'"),
        ({"frozen": ["encoder.conv_in.weight"]}, r"frozen='encoder.conv_in.weight', .* 'encoder.conv_in'"),
        ({"frozen": [*ENCODING, "decoder", "post_quant_conv"]}, "expected fewer parts: nothing would learn"),
        ({"init": "nowhere"}, "init='nowhere': no such file or folder; name an export"),
        ({"model": AutoencoderConfig(latent_channels=5)}, r"model.latent_channels=5, expected 3 of init='.*base'"),
        ({"model": AutoencoderConfig(scaling_factor=0.5)}, "model.scaling_factor=0.5, expected 0.7 of init="),
        ({"latents": "middle"}, r"latents='middle', expected one of \['sampled', 'mean'\]"),
        ({"resolution": 33}, "data.resolution=33, expected a multiple of the model's downsampling factor 2"),
    ],
)
def test_what_cannot_be_begun_is_refused_before_a_run_has_a_folder(decoder_only, changes, message):
    data = replace(decoder_only.data, resolution=changes.pop("resolution", 32))
    with pytest.raises(InputError, match=message):
        train(replace(decoder_only, data=data, **changes))
    assert not Path(decoder_only.output).exists()


def test_a_resolution_is_judged_by_the_architecture_of_the_weights(decoder_only):
    """20 is no multiple of the default's 8, but of this model's 2."""
    config = without_adversary(replace(decoder_only, data=replace(decoder_only.data, resolution=20), updates=1))
    assert math.isfinite(_columns(train(config))["train/pixel"][0])
