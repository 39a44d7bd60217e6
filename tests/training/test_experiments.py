"""Every recipe in configs/experiment composes, and trains: its own loss, schedule and frozen parts, in small."""

from dataclasses import replace
from pathlib import Path

import pytest
import skimage.data
import torch
from torch import Tensor
from torch.nn import functional

from tests.conftest import read_json
from tests.presets import CONFIGS
from vae.config.compose import compose
from vae.config.loss import DiscriminatorConfig, LossConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.errors import InputError
from vae.losses.adversarial import AdversarialLoss
from vae.losses.autoencoder_loss import Objective
from vae.models.base import build_autoencoder
from vae.models.discriminator import PatchDiscriminator
from vae.models.lpips import BACKBONES, MissingBackboneError, load_backbone
from vae.training.train import train
from vae.weights import load_autoencoder, save_autoencoder

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
WITH_ADVERSARY = [
    "anime",
    "finetune_16_channels",
    "finetune_sd_decoder",
    "inflate_8_channels",
    "ldm_f16c16",
    "ldm_f32c64",
    "ldm_f4c3",
    "ldm_f8c4",
    "quickstart",
    "sd3_f8c16",
    "sdxl_f8c4",
]
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
    assert bool(weights["adversarial"]) == (name in WITH_ADVERSARY)
    expected = {"adversarial", "pixel", "perceptual", "activation"} & {key for key, value in weights.items() if value}
    if name == "encoder_from_teacher":
        expected = {"latent"}
    assert {f"train/{term}" for term in expected} <= set(columns)
    assert load_autoencoder(run / "exports" / f"step_{UPDATES:07}" / "diffusers") is not None


def _photograph(side: int) -> Tensor:
    """The middle of an embedded photograph, (1, 3, side, side) in [-1, 1]."""
    pixels = torch.from_numpy(skimage.data.astronaut())
    start = (pixels.shape[0] - side) // 2
    square = pixels[start : start + side, start : start + side]
    return square.permute(2, 0, 1)[None] / 127.5 - 1.0


def _shares_of_the_adversary(loss: LossConfig, side: int, bounds: list[dict[str, float]]) -> list[float]:
    """At the last layer, of what its weight asks for, with each of the `bounds`.

    The decoder is a stand-in that makes blurred pictures, as one of f8c4 does; the discriminator has an opinion.
    """
    judge = DiscriminatorConfig(channels=8, layers=loss.discriminator.layers)
    loss = replace(loss, discriminator=judge, perceptual_net="alex")
    discriminator, last_layer = PatchDiscriminator(judge), torch.nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        discriminator.main[-1].weight.mul_(10.0)  # pyright: ignore[reportCallIssue]
        torch.nn.init.dirac_(last_layer.weight)

    images = _photograph(side)
    features = functional.interpolate(functional.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
    leaf = last_layer(features).detach().requires_grad_()
    objective = Objective(loss)
    (gradient,) = torch.autograd.grad(objective.weighted_sum(objective.of_images(images, leaf), updates=0), leaf)

    shares = []
    for bound in bounds:
        game = AdversarialLoss(discriminator, replace(loss, **bound), last_layer)
        _, logs = game.gradient(leaf, gradient, features, scale=1.0)
        shares.append(logs["adversarial_share"].item())
    return shares


@pytest.mark.parametrize("name", WITH_ADVERSARY)
def test_in_every_recipe_with_an_adversary_it_has_its_share_of_the_last_layers_gradient(name, both_nets):
    """A bound of 100 on summed losses left 0.2 to 2 % of it to a decoder's adversary."""
    asked = [f"{key}=MODEL.safetensors" for key in ("init", "teacher") if uses(name, key)]
    config = compose(f"experiment={name}", *asked)
    assert config.loss.adaptive
    share, before = _shares_of_the_adversary(config.loss, config.data.resolution, [{}, {"adaptive_maximum": 100.0}])
    assert before < 0.1
    assert 0.5 < share < 1.5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_recipe_says_what_was_measured_and_by_whom(name):
    note = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"experiment={name}" in note
    assert any(word in note for word in ("(measured", "not measured by us", "figures of ours"))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if uses(name, "init")])
def test_a_recipe_that_begins_from_a_model_asks_for_it(name):
    with pytest.raises(InputError, match="init=MODEL, expected a weights file, an export or a run in its place"):
        compose(f"experiment={name}")
