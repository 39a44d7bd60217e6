"""What an export says of its latents: one scale, of these latents, and whether somebody stated it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import read_json, without_adversary, write_foreign
from tests.presets import TINY
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.build import open_sources
from vae.data.loader import first_images
from vae.data.transforms import to_model_range
from vae.latents import scale_latents
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.training.export import export_checkpoint
from vae.training.initialise import initial_state
from vae.training.manifest import newest_whole
from vae.training.train import train
from vae.weights import load_autoencoder, read_autoencoder, save_autoencoder
from vae.weights.load import find_export

ENCODING = ["encoder", "quant_conv"]
Perturbed = Callable[[AutoencoderConfig], AutoencoderKL]


@pytest.fixture
def short(tiny_run: TrainConfig) -> TrainConfig:
    """Two updates of what is begun from."""
    return replace(without_adversary(tiny_run), model=AutoencoderConfig(), updates=2, validate_every=2)


def exports_of(run: Path) -> list[Path]:
    """Of its end, its best and its checkpoint: every folder and file."""
    export_checkpoint(run, newest_whole(run / "checkpoints")[0], torch.device("cpu"))
    return [*(run / "exports").glob("*/diffusers"), *(run / "exports").glob("*/*.safetensors")]


def test_a_measured_scaling_factor_replaces_the_mean_and_std_per_channel_of_init(
    short, tiny, perturbed: Perturbed, tmp_path
):
    """Beside them it would bring latents to an eighth of the spread that diffusion models are trained on."""
    lists = replace(tiny, scaling_factor=1.0, latents_mean=[0.5] * 3, latents_std=[8.0] * 3)
    base = save_autoencoder(perturbed(lists), tmp_path / "base")
    run = train(replace(short, init=str(base)))
    held_out = open_sources(short.data)[1]
    images = to_model_range(first_images(held_out, short.data, 3))
    for path in exports_of(run):
        model = load_autoencoder(path)
        assert (model.config.latents_mean, model.config.latents_std) == (None, None)
        with torch.no_grad():
            assert scale_latents(model.encode(images).sample(), model.config).std().item() == pytest.approx(
                1.0, rel=0.2
            )
    card = (run / "exports" / "step_0000002" / "diffusers" / "README.md").read_text()
    assert "latents_std" not in card
    assert "measured, 1 / standard deviation" in card
    kept = train(replace(short, init=str(base), name="kept", frozen=ENCODING, keep_best=None))
    assert load_autoencoder(kept).config.latents_std == [8.0] * 3


def test_as_many_latent_channels_as_init_has_change_no_latent_and_no_factor(
    short, tiny, perturbed: Perturbed, tmp_path
):
    base = save_autoencoder(perturbed(replace(tiny, scaling_factor=0.7)), tmp_path / "base")
    config = replace(short, init=str(base), latent_channels=3, frozen=ENCODING)
    run = train(config)
    assert {load_autoencoder(path).config.scaling_factor for path in exports_of(run)} == {0.7}
    train(replace(config, updates=3, resume=str(run)))
    assert load_autoencoder(run / "exports" / "step_0000003" / "diffusers").config.scaling_factor == 0.7


def test_as_many_latent_channels_as_a_tiny_init_has_leave_it_its_family(short, tmp_path):
    base = save_autoencoder(AutoencoderTiny(TINY()), tmp_path / "taesd_decoder.safetensors", "taesd")
    run = train(replace(short, init=str(base), latent_channels=4))
    assert read_json(run / "origin.json")["family"] == "sd"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    config = AutoencoderConfig(block_out_channels=[32, 32], layers_per_block=1, mid_block_add_attention=False)
    return write_foreign(AutoencoderKL(config), tmp_path / "foreign.safetensors")


def test_a_factor_that_init_does_not_tell_is_called_assumed_in_every_export_that_keeps_it(short, foreign):
    config = replace(short, init=str(foreign), frozen=ENCODING)
    run = train(config)
    train(replace(config, updates=3, resume=str(run)))
    for path in exports_of(run):
        found = read_autoencoder(path)
        assert (found.config.scaling_factor, found.scale_is_known) == (0.18215, False)
    assert "assumed, since the file they came from" in (run / "exports/step_0000003/diffusers/README.md").read_text()
    measured = train(replace(config, name="measured", frozen=[], keep_best=None))
    assert read_autoencoder(find_export(measured)).scale_is_known
    told = initial_state(
        replace(config, model=AutoencoderConfig(scaling_factor=0.13025)), run.parent / "told"
    ).config.model
    assert (told.scaling_factor, told.scale_is_known) == (0.13025, True)


def test_a_teacher_that_does_not_tell_its_scale_is_said_and_its_students_is_assumed(short, foreign, tmp_path):
    shape = AutoencoderConfig(block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)
    config = replace(short, teacher=str(foreign), model=shape)
    start = initial_state(config, tmp_path / "none")
    assert "foreign.safetensors' does not tell its scaling factor: 0.18215 is taken" in start.notes[0]
    run = train(config)
    assert not any(read_autoencoder(path).scale_is_known for path in exports_of(run))


def test_a_scale_that_is_stated_for_init_leaves_nothing_of_the_guess(short, tmp_path):
    """SD3's factor with FLUX's shift is nobody's."""
    flux = AutoencoderConfig(
        latent_channels=16,
        block_out_channels=[32, 32],
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    init = write_foreign(AutoencoderKL(flux), tmp_path / "foreign.safetensors")
    config = replace(short, init=str(init))
    guessed, stated = (
        initial_state(replace(config, model=model), tmp_path / "none").config.model
        for model in (AutoencoderConfig(), AutoencoderConfig(scaling_factor=1.5305))
    )
    assert (guessed.scaling_factor, guessed.shift_factor, guessed.scale_is_known) == (0.3611, 0.1159, False)
    assert (stated.scaling_factor, stated.shift_factor, stated.scale_is_known) == (1.5305, None, True)
