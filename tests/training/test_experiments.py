"""Every recipe in configs/experiment composes, and trains: its own loss, schedule and frozen parts, in small."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import read_json
from tests.presets import CONFIGS
from vae import compose
from vae.checkpoints import load_autoencoder, save_autoencoder
from vae.config import TrainConfig
from vae.errors import InputError
from vae.models.architectures import build_autoencoder
from vae.models.autoencoder import AutoencoderConfig
from vae.models.backbones import BACKBONES
from vae.models.discriminator import DiscriminatorConfig
from vae.models.features import MissingBackboneError, load_backbone
from vae.training.run import train

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
UPDATES = 3
TINY = {
    "architecture": "tiny",
    "latent_channels": 3,
    "block_out_channels": [8] * 4,
    "layers_per_block": 1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


@pytest.fixture
def both_nets() -> None:
    for net in BACKBONES:
        try:
            load_backbone(net)
        except MissingBackboneError as error:
            pytest.skip(str(error))


def small(model: AutoencoderConfig) -> AutoencoderConfig:
    """The same kind of network, a few channels wide."""
    return replace(model, block_out_channels=[8] * len(model.block_out_channels), layers_per_block=1, norm_num_groups=4)


@pytest.fixture
def published(tmp_path: Path) -> dict[str, str]:
    """What the recipes begin from, by the key that names it."""
    paths = {}
    for key, config in (("kl", small(AutoencoderConfig())), ("tiny", AutoencoderConfig(**TINY))):
        torch.manual_seed(1)
        paths[key] = str(save_autoencoder(build_autoencoder(config), tmp_path / key))
    return paths


def in_small(name: str, published: dict[str, str], output: Path) -> TrainConfig:
    """Recipe `name` on embedded photographs, all its parts awake within three updates."""
    asked = {"init": published["tiny" if name == "finetune_taesd" else "kl"], "teacher": published["kl"]}
    config = compose(f"experiment={name}", *(f"{key}={path}" for key, path in asked.items() if uses(name, key)))
    loss, begins = config.loss, config.loss.autoencoder_start > 0
    return replace(
        config,
        name=name,
        output=str(output),
        updates=UPDATES,
        validate_every=UPDATES,
        model=AutoencoderConfig() if config.init else small(config.model),
        loss=replace(
            loss,
            autoencoder_start=int(begins),
            discriminator_start=0,
            adversarial_start=1 if loss.weights.adversarial else loss.adversarial_start,
            discriminator=DiscriminatorConfig(channels=8, layers=1),
        ),
        data=replace(
            config.data,
            source="photos",
            resolution=32 * max(1, config.model.downsample_factor // 16),
            batch_size=2,
            workers=0,
        ),
        trainer={"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    )


def uses(name: str, key: str) -> bool:
    """Whether a recipe, or the one that it goes on from, asks for the value of `key`."""
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    base = [line.strip("- ") for line in text.splitlines() if line.strip("- ") in EXPERIMENTS]
    return f"{key}: MODEL" in text or any(uses(one, key) for one in base)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_recipe_trains(name, published, tmp_path, both_nets):
    config = in_small(name, published, tmp_path / "runs")
    run = train(config)
    columns = (run / "metrics.csv").read_text().partition("\n")[0].split(",")
    weights = read_json(run / "config.json")["loss"]["weights"]
    expected = {"adversarial", "pixel", "perceptual", "activation"} & {key for key, value in weights.items() if value}
    if name == "encoder_from_teacher":
        expected = {"latent"}
    assert {f"train/{term}" for term in expected} <= set(columns)
    assert load_autoencoder(run / "exports" / f"step_{UPDATES:07}" / "diffusers") is not None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_recipe_says_what_was_measured_and_by_whom(name):
    note = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"experiment={name}" in note
    assert any(word in note for word in ("(measured", "not measured by us", "figures of ours"))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if uses(name, "init")])
def test_a_recipe_that_begins_from_a_model_asks_for_it(name):
    with pytest.raises(InputError, match="init=MODEL, expected a weights file, an export or a run in its place"):
        compose(f"experiment={name}")
