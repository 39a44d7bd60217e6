"""Where a run's weights come from: a published model, its own checkpoint, or chance."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from vae.checkpoints import Found, read_autoencoder
from vae.checkpoints.exports import find_export
from vae.checkpoints.families import families_of
from vae.checkpoints.latentfile import SCALE_KEYS
from vae.config import TrainConfig
from vae.data.sources import Source
from vae.errors import require
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL
from vae.training.folder import goes_on, model_of
from vae.training.frozen import freeze, posterior_learns
from vae.training.module import Training
from vae.training.pairs import PairedLatents, pair

MEASURED = ("force_upcast", "sample_size")  # found anew for every export


class Start(NamedTuple):
    """`config` has the architecture of the weights; `found` are those to begin from, none where the run goes on.

    `latents` are those of the training images, where they were made before; `notes` are to be told.
    """

    config: TrainConfig
    found: Found | None = None
    latents: PairedLatents | None = None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Of what is trained on besides the images."""
        return () if self.latents is None else (self.latents.stored.fingerprint(),)


def start_of(config: TrainConfig, folder: Path, images: Source | None = None) -> Start:
    """For a run in `folder`; one that goes on has its architecture, and reads no `init` again.

    Latents are looked for where the training `images` are given.
    """
    start = Start(config) if config.init is None else _initialised(config, folder)
    with torch.device("meta"):
        autoencoder = AutoencoderKL(start.config.model)
    freeze(autoencoder, config.frozen)
    if config.data.latents is None:
        return start
    given = f"frozen={config.frozen} with data.latents"
    require(not posterior_learns(autoencoder), given, "[encoder,quant_conv]: latents that were made do not change")
    return start if images is None else start._replace(latents=pair(start.config, images, start.found))


def begin(start: Start, training: Training) -> Training:
    """The autoencoder and its average get the weights to begin from, in float32."""
    if start.found is not None:
        training.autoencoder.load_state_dict(start.found.state)
        training.average.load_state_dict(start.found.state)
        start.found.state.clear()  # else held for the whole run
    return training


def _initialised(config: TrainConfig, folder: Path) -> Start:
    assert config.init is not None
    if goes_on(config, folder):
        return Start(_of_model(config, model_of(folder), knows_scale=True))
    found = read_autoencoder(find_export(config.init, "init"))
    knows_scale = found.scale_is_known or len(families_of(found.config)) == 1
    config, scale = _of_model(config, found.config, knows_scale), found.config.scaling_factor
    is_guess = not knows_scale and config.model.scaling_factor == scale
    note = f"init={config.init!r} does not tell its scaling factor: {scale} is taken; model= or model.scaling_factor="
    return Start(config, found, notes=(f"{note} states another",) if is_guess else ())


def _of_model(config: TrainConfig, stated: AutoencoderConfig, knows_scale: bool) -> TrainConfig:
    """`config` with the architecture that is `stated`; what was chosen besides must be the same.

    A value that is not the default was chosen. Where the scale is a guess, what was chosen of it counts.
    """
    default, there = asdict(AutoencoderConfig()), asdict(stated)
    chosen = {key: value for key, value in asdict(config.model).items() if value != default[key]}
    scale = {key: chosen.pop(key) for key in SCALE_KEYS if key in chosen and not knows_scale}
    for key, value in chosen.items():
        fits = value == there[key] or key in MEASURED
        expected = f"{there[key]} of init={config.init!r}, or no model besides"
        require(fits, f"model.{key}={value}", expected)
    config = replace(config, model=replace(stated, **scale))
    config.check_model()
    return config
