"""The published weights of a run: at its end, or later from one of its checkpoints."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor

from vae.audit.precision import audit_precision
from vae.checkpoints import ONE_FILE, Found, Notes, save_autoencoder
from vae.checkpoints.card import CARD_FILE, may_be_written, model_card
from vae.checkpoints.detect import find_autoencoder
from vae.checkpoints.found import Source, check_complete, check_finite
from vae.checkpoints.metadata import read_json
from vae.checkpoints.pickles import read_pickle
from vae.checkpoints.safe import write_text
from vae.config import CONFIG_FILE
from vae.data.config import DataConfig
from vae.data.loading import first_images, validation_loader
from vae.data.opening import open_sources
from vae.data.transforms import to_model_range
from vae.errors import InputError
from vae.latents import LatentStatistics, measure_latents
from vae.models.architectures import build_autoencoder
from vae.models.autoencoder import AutoencoderConfig
from vae.models.interface import Autoencoder
from vae.models.latent_channels import keeps_channels
from vae.training.counts import images_per_update
from vae.training.folder import read_progress
from vae.training.frozen import freeze, posterior_learns
from vae.training.manifest import step_name
from vae.training.module import Training
from vae.training.provenance import (
    CHANNELS_OF_INIT,
    SCALE_IS_ASSUMED,
    as_logged,
    describe,
    logged_at,
    validation_of,
)
from vae.training.validation import AUDITED

EXPORTS = "exports"  # of a run, in its directory
LATER: dict[str, Any] = dict.fromkeys(("init", "latent_channels", "teacher")) | {
    "frozen": [],
    "trained": [],
}  # not in older runs
Part = TypeVar("Part")


def export(training: Training, run: Path, name: str | None = None) -> list[Path]:
    """The averaged weights of `training`, as its last validation found them: `exports/NAME`, else by their update."""
    config = training.config
    with torch.device("meta"):
        model = build_autoencoder(config.model)
    model.load_state_dict(training.average.state_dict(), strict=True, assign=True)
    images = images_per_update(config, training.trainer)
    summary = describe(asdict(config), run, training.updates, images, training.autoencoder)
    folder, validation = run / EXPORTS / (name or step_name(training.updates)), training.validation
    summary |= _validation(as_logged(validation.measured), validation.latents, config.data, config.model)
    scale_stays = _scale_stays(asdict(config), summary, learns=training.posterior_learns)
    return publish(model.eval(), folder, summary, validation.latents, validation.audited, scale_stays=scale_stays)


def publish(
    model: Autoencoder,
    folder: Path,
    summary: dict[str, Any],
    statistics: LatentStatistics,
    images: Tensor,
    *,
    scale_stays: bool,
) -> list[Path]:
    """`model` as a diffusers folder, where that can hold it, and as one file, in `folder`, one of a run's exports.

    The card is in the diffusers folder, or else beside the file. Returns the paths of the weights.
    The scaling factor is the measured one, 1 / std of the validation latents; so is the shift where the model has one.
    With `scale_stays` they are the model's: its latents are those of a published one, and of diffusion models for that.
    So are a tiny one's, which are scaled. Where they are a guess of the run's beginning, `summary` says so.
    `force_upcast` says whether float16 is unsafe, as found on `images` (B, C, H, W) in [-1, 1], where they are.
    """
    shift = None if model.config.shift_factor is None else statistics.mean
    kept = model.config.assuming_its_scale() if summary.get(SCALE_IS_ASSUMED) else model.config
    stays = scale_stays or model.config.architecture == "tiny"
    config = kept if stays else model.config.with_scale(statistics.scaling_factor, shift)
    model.config = replace(config, sample_size=summary["resolution"])
    audit = audit_precision(model.to(images.device), list(images[:AUDITED].split(1)))
    model.config = replace(model.config, force_upcast=not audit.is_safe)
    training = {name: value for name, value in summary.items() if name != SCALE_IS_ASSUMED}
    notes = Notes(latents=statistics.summary(), training=training | {"precision": audit.verdict})
    places = {} if model.config.mid_block_pool else {folder / "diffusers": "diffusers"}
    places |= {folder / f"{folder.parents[1].name}.vae.safetensors": ONE_FILE[model.config.architecture]}
    family = summary.get("family")
    paths = [save_autoencoder(model, path, format, notes=notes, family=family) for path, format in places.items()]
    if len(paths) == 1 and may_be_written(folder / CARD_FILE):
        parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        write_text(folder / CARD_FILE, model_card(model.config, notes, parameters))
    return paths


def export_checkpoint(
    run: Path, checkpoint: Path, device: torch.device, images: str | None = None, *, live: bool = False
) -> tuple[list[Path], AutoencoderConfig]:
    """What `export` would have written at `checkpoint` of `run`; `live` takes the weights as they were, not averaged.

    Measured on the run's validation images, or on those of the folder `images`. Returns the configuration too.
    """
    config = LATER | read_json(run / CONFIG_FILE)
    found = _weights(run, checkpoint, config, "autoencoder." if live else "average.")
    data = _part(run, config, "data", DataConfig)
    if images is not None:
        data = data.of_folder(images)
    held_out, channels = open_sources(data)[1], found.config.in_channels
    loader = validation_loader(held_out, data, channels, rank=0, world_size=1)
    batches = track(loader, "Measuring latents", math.ceil(len(held_out) / data.validation_batch_size))
    model = found.build().to(device)
    whole = (to_model_range(batch.images.to(device)) for batch in batches if len(batch.images))
    statistics = measure_latents(model, whole)
    freeze(model, config["frozen"], config["trained"])
    learns, (updates, together, _) = posterior_learns(model), read_progress(checkpoint)
    summary = describe(config, run, updates, together, model, "live" if live else "EMA")
    if images is None and not live:  # else they are not those that were validated
        summary |= _validation(logged_at(run, updates), statistics, data, model.config)
    judged = to_model_range(first_images(held_out, data, channels).to(device))
    mark = "live_" if live else ""  # beside the averaged ones, and never taken for them
    folder = run / EXPORTS / f"{mark}{step_name(updates)}"
    scale_stays = _scale_stays(config, summary, learns=learns)
    paths = publish(model, folder, summary, statistics, judged, scale_stays=scale_stays)
    return paths, model.config


def _scale_stays(config: dict[str, Any], summary: dict[str, Any], *, learns: bool) -> bool:
    """Where latents are a published model's: its encoder does not learn, or what it learns are a teacher's."""
    channels_stay = keeps_channels(config["latent_channels"], summary.get(CHANNELS_OF_INIT))
    is_as_before = config["init"] is not None and channels_stay and not learns
    return is_as_before or config["teacher"] is not None


def _validation(
    measured: dict[str, float], statistics: LatentStatistics, data: DataConfig, model: AutoencoderConfig
) -> dict[str, Any]:
    """Images that could not be read were not measured, so they are counted by their latents."""
    images = statistics.count // (data.resolution // model.downsample_factor) ** 2
    return validation_of(measured, images, data.resolution)


def _weights(run: Path, checkpoint: Path, config: dict[str, Any], prefix: str) -> Found:
    state = read_pickle(checkpoint, lambda names: {name for name in names if name.startswith(prefix)})
    state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = find_autoencoder(Source(checkpoint, state), _part(run, config, "model", AutoencoderConfig))
    check_complete(found)
    check_finite(found)
    return found


def _part(run: Path, config: dict[str, Any], name: str, kind: type[Part]) -> Part:
    try:
        return kind(**config[name])
    except (KeyError, TypeError) as error:
        raise InputError(f"{run / CONFIG_FILE}: {name} is not what this version of vae writes ({error})") from error
