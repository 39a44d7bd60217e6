"""What is said of the config is read from its fields, and the fields agree with what they describe."""

from pathlib import Path

import pytest

from vae.config import data, loss, optim, schema
from vae.config.fields import walk
from vae.config.reference import help_text, page
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.data.build import SOURCES
from vae.evaluation.protocols import PROTOCOLS
from vae.losses.adversarial import ADVERSARIAL_LOSSES
from vae.losses.autoencoder_loss import PIXEL_LOSSES
from vae.losses.diff_augment import AUGMENTATIONS
from vae.metrics.registry import OF_SETS, PAIRED
from vae.models.discriminator import NORMS
from vae.models.lpips import BACKBONES
from vae.training.optim import OPTIMISERS, SCHEDULES
from vae.training.step import LATENTS

ROOT = Path(__file__).resolve().parent.parent.parent

CHOICES = {  # what the config allows, and the registry that implements it
    "data.source": (data.SOURCES, SOURCES),
    "evaluation protocol": (schema.PROTOCOLS, PROTOCOLS),
    "paired metrics": (schema.PAIRED_METRICS, PAIRED),
    "metrics of sets": (schema.SET_METRICS, OF_SETS),
    "latents": (schema.LATENTS, LATENTS),
    "loss.pixel": (loss.PIXEL_LOSSES, PIXEL_LOSSES),
    "loss.perceptual_net": (loss.PERCEPTUAL_NETS, BACKBONES),
    "loss.adversarial": (loss.ADVERSARIAL_LOSSES, ADVERSARIAL_LOSSES),
    "loss.augment": (loss.AUGMENTATIONS, AUGMENTATIONS),
    "loss.discriminator.norm": (loss.DISCRIMINATOR_NORMS, NORMS),
    "optim.name": (optim.OPTIMISERS, OPTIMISERS),
    "optim.schedule": (optim.SCHEDULES, SCHEDULES),
}


@pytest.mark.parametrize("key", CHOICES)
def test_what_the_config_allows_is_what_is_implemented(key):
    allowed, registry = CHOICES[key]
    assert sorted(allowed) == sorted(registry)


def test_every_field_has_its_sentence():
    for config in (TrainConfig(), EvaluateConfig(model="runs/first")):
        for key, field, _ in walk(config):
            assert field.metadata["text"].endswith("."), key


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_shows_every_key_within_eighty_columns(command):
    config = TrainConfig() if command == "train" else EvaluateConfig(model="runs/first")
    shown = help_text(command, width=80)
    for key, _, _ in walk(config):
        assert f"  {key}=" in shown
    sentences = [line for line in shown.splitlines() if line.startswith("      ")]
    assert max(map(len, sentences)) <= 80


def test_the_page_about_configuration_is_current():
    """`python -m vae.config.reference > docs/configuration.md` makes it anew."""
    assert (ROOT / "docs" / "configuration.md").read_text() == page()
