"""Where a run's weights come from: a published model, its own checkpoint, or random initialisation.

`initial_state` finds the weights and the final configuration before networks are built; `load_initial_weights` puts
the weights into them.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig
from vae.data.loader import first_images
from vae.data.sources import Source
from vae.data.transforms import to_model_range
from vae.errors import require
from vae.models.autoencoder_kl import as_kl
from vae.models.base import Autoencoder, build_autoencoder
from vae.models.resize_latents import keeps_channels, with_latent_channels
from vae.precision.audit import audit_precision
from vae.precision.rescale import rescale_checked
from vae.training.cached_latents import PairedLatents, match_cached_latents
from vae.training.module import AutoencoderModule
from vae.training.optim import decoder_learns, freeze, posterior_learns
from vae.training.resume import as_begun, is_resumed, model_of
from vae.training.step import Teacher
from vae.training.validation import AUDITED
from vae.weights import load_autoencoder, read_autoencoder
from vae.weights.families import is_published_network
from vae.weights.latent_files import SCALE_KEYS, config_digest, encoder_digest
from vae.weights.load import find_export
from vae.weights.loaded import LoadedWeights

MEASURED = ("force_upcast", "sample_size")  # every export measures them anew


class InitialState(NamedTuple):
    """What a run begins with.

    `config` has the architecture of the weights. `found` are the weights to begin from, or None for a resumed run
    and for random weights. `channels_before` is the number of latent channels that `init` had. `latents` are the
    cached latents of the training images, if there are any. `notes` are printed when the run begins.
    """

    config: TrainConfig
    found: LoadedWeights | None = None
    channels_before: int | None = None
    teacher: Teacher | None = None
    latents: PairedLatents | None = None
    notes: tuple[str, ...] = ()
    groups_are_assumed: bool = False

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Digests of what the run is trained on besides the images: cached latents and the teacher."""
        latents = () if self.latents is None else (self.latents.stored.fingerprint(),)
        if self.teacher is None:
            return latents

        model = self.teacher.model
        return (*latents, encoder_digest(model.state_dict()), config_digest(model.config))


def initial_state(config: TrainConfig, folder: Path, images: Source | None = None) -> InitialState:
    """Return what a run in `folder` begins with.

    A resumed run has the architecture and the adaptive weight's bound that it began with, and does not read `init`
    again. Cached latents are looked for, and weights made safe in float16, only if the training `images` are passed.
    Raises InputError if parts of the configuration do not fit together.
    """
    config = as_begun(config, folder)
    start = InitialState(config) if config.init is None else _initialised(config, folder, images)

    # Parameters without contents are enough to see which parts learn.
    with torch.device("meta"):
        autoencoder = build_autoencoder(start.config.model)
    freeze(autoencoder, config.frozen, config.trained)
    _check_parts(start.config, autoencoder, start.channels_before)

    start = _taught(start, teacher_of(start.config))
    if config.data.latents is None:
        return start

    given = f"frozen={config.frozen} with data.latents"
    require(not posterior_learns(autoencoder), given, "[encoder,quant_conv]: latents that were made do not change")
    return start if images is None else start._replace(latents=match_cached_latents(start.config, images, start.found))


def _check_parts(config: TrainConfig, autoencoder: Autoencoder, before: int | None) -> None:
    """Check that the parts that learn fit the rest. `before` is the number of latent channels of `init`."""
    learns = posterior_learns(autoencoder)
    adversarial = config.loss.weights.adversarial
    more = before is not None and config.model.latent_channels > before
    remedy = "an encoder that learns: new channels say nothing yet"
    require(learns or not more, f"frozen={config.frozen} with latent_channels={config.latent_channels}", remedy)

    useful = learns or config.teacher is None or config.init is not None
    require(useful, f"frozen={config.frozen} with teacher={config.teacher!r}", "an encoder that learns, or init=MODEL")

    decodes = config.teacher is None or decoder_learns(autoencoder)
    given = f"loss.weights.adversarial={adversarial} where nothing but the encoder learns from a teacher"
    require(decodes or not adversarial, given, "0, as of loss=plain: nothing is decoded")


def _taught(start: InitialState, teacher: Teacher | None) -> InitialState:
    """Return `start` with the teacher.

    If the scaling factor of the teacher is a guess, so is that of the student.
    """
    if teacher is None or teacher.model.config.scale_is_known:
        return start._replace(teacher=teacher)

    scale = teacher.model.config.scaling_factor
    guess = f"teacher={start.config.teacher!r} does not tell its scaling factor: {scale} is taken"
    note = f"{guess}; vae convert FILE FOLDER --family states another once and for all"

    config = replace(start.config, model=start.config.model.assuming_its_scale())
    return start._replace(config=config, teacher=teacher, notes=(*start.notes, note))


def teacher_of(config: TrainConfig) -> Teacher | None:
    """Return the teacher that `config` names, or None."""
    if config.teacher is None:
        return None
    return Teacher(load_autoencoder(find_export(config.teacher, "teacher")), config.model)


def load_initial_weights(start: InitialState, training: AutoencoderModule) -> AutoencoderModule:
    """Load the weights to begin from into the autoencoder and its EMA model, in float32. Return `training`."""
    if start.found is not None:
        training.autoencoder.load_state_dict(start.found.state)
        training.ema_model.load_state_dict(start.found.state)
        start.found.state.clear()  # else the weights stay in memory for the whole run
    training.autoencoding.teacher = start.teacher
    return training


def _initialised(config: TrainConfig, folder: Path, images: Source | None) -> InitialState:
    """Return the initial state of a run with `init`: its weights and its architecture.

    The latent channels are resized and the layers rescaled for float16 if `config` asks for it.
    """
    assert config.init is not None
    if is_resumed(config, folder):
        return InitialState(_of_model(config, model_of(folder)))

    found = read_autoencoder(find_export(config.init, "init"))
    notes = []
    knows_groups = found.groups_are_known or is_published_network(found.config) or config.model != AutoencoderConfig()

    config, before = _of_model(config, found.config), found.config.latent_channels

    # Random numbers of new channels depend on the run's seed only, and leave the global generator unchanged.
    if config.latent_channels is not None and not keeps_channels(config.latent_channels, before):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            state, changed = with_latent_channels(found.state, config.model, config.latent_channels)
        notes.append(f"{before} latent channels of init become {config.latent_channels}")
        found, config = replace(found, state=state, config=changed), replace(config, model=changed)

    if not config.model.scale_is_known:
        guess = f"init={config.init!r} does not tell its scaling factor: {config.model.scaling_factor} is taken"
        notes.append(f"{guess}; model= or model.scaling_factor= states another")
    groups_are_assumed = not found.groups_are_known and config.model.norm_num_groups == found.config.norm_num_groups
    if not knows_groups:
        guess = f"init={config.init!r} does not tell norm_num_groups: {found.config.norm_num_groups} is taken"
        notes.append(f"{guess}; vae convert --config states another")

    if config.fp16_safe and images is not None:
        channels = config.model.in_channels
        found, changed = _made_safe(found, to_model_range(first_images(images, config.data, channels)))
        notes.append(f"fp16_safe: {changed} layers of init were rescaled, the function is the same")
    return InitialState(config, found, before, notes=tuple(notes), groups_are_assumed=groups_are_assumed)


def _made_safe(found: LoadedWeights, images: Tensor) -> tuple[LoadedWeights, int]:
    """Return weights rescaled exactly as far as an audit asks for, and how many layers changed.

    The audit runs on `images` (B, C, H, W) in [-1, 1]. Raises InputError if rescaling would change the model's
    output.
    """
    model = as_kl(found.build(), "fp16_safe=true", "false: no norm in it undoes a scale")

    looked_at = list(images[:AUDITED].split(1))
    done = rescale_checked(model, audit_precision(model, looked_at), looked_at)

    remedy = "false: rescaling init changes its images; loss.weights.activation alone may help"
    require(done.is_exact, "fp16_safe=true", remedy)
    return replace(found, state=model.state_dict()), done.layers


def _of_model(config: TrainConfig, stated: AutoencoderConfig) -> TrainConfig:
    """Return `config` with the architecture `stated`. Raises InputError if the user chose another value.

    A value that is not the default was chosen by the user. If the scale of `stated` is a guess, a scale that the
    user chose takes its place entirely.
    """
    default = asdict(AutoencoderConfig())
    there = asdict(stated)
    chosen = {key: value for key, value in asdict(config.model).items() if value != default[key]}
    scale = {key: chosen.pop(key) for key in SCALE_KEYS if key in chosen and not stated.scale_is_known}

    for key, value in chosen.items():
        fits = value == there[key] or key in MEASURED
        expected = f"{there[key]} of init={config.init!r}, or no model besides"
        require(fits, f"model.{key}={value}", expected)

    whole = {key: getattr(config.model, key) for key in SCALE_KEYS}
    config = replace(config, model=stated.with_scale(**whole) if scale else stated)
    config.check_model()
    return config
