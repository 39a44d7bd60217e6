"""The published weights of a run: at its end, or later from one of its checkpoints."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor

import vae
from vae.audit.precision import audit_precision
from vae.checkpoints import Found, Notes, save_autoencoder
from vae.checkpoints.detect import find_autoencoder
from vae.checkpoints.found import Source, check_complete, check_finite
from vae.checkpoints.metadata import read_json
from vae.checkpoints.pickles import read_pickle
from vae.config import CONFIG_FILE
from vae.data.config import DataConfig
from vae.data.loading import first_images, validation_loader
from vae.data.opening import open_sources
from vae.data.transforms import to_model_range
from vae.errors import InputError
from vae.latents import LatentStatistics, measure_latents
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL
from vae.training.folder import read_progress
from vae.training.frozen import freeze, posterior_learns
from vae.training.manifest import step_name
from vae.training.module import Training
from vae.training.validation import AUDITED

EXPORTS = "exports"  # of a run, in its directory
Part = TypeVar("Part")


def export(training: Training, run: Path, name: str | None = None) -> list[Path]:
    """The averaged weights of `training`, as its last validation found them: `exports/NAME`, else by their update."""
    config = training.config
    with torch.device("meta"):
        model = AutoencoderKL(config.model)
    model.load_state_dict(training.average.state_dict(), strict=True, assign=True)
    summary = describe(asdict(config), training.updates)
    folder, validation = run / EXPORTS / (name or step_name(training.updates)), training.validation
    scale_stays = config.init is not None and not training.posterior_learns
    return publish(model.eval(), folder, summary, validation.latents, validation.audited, scale_stays=scale_stays)


def publish(
    model: AutoencoderKL,
    folder: Path,
    summary: dict[str, Any],
    statistics: LatentStatistics,
    images: Tensor,
    *,
    scale_stays: bool,
) -> list[Path]:
    """`model` as a diffusers folder and as one LDM file for `models/VAE`, in `folder`, one of a run's exports.

    The scaling factor is the measured one, 1 / std of the validation latents; so is the shift where the model has one.
    With `scale_stays` they are the model's: its latents are those of a published one, and of diffusion models for that.
    `force_upcast` says whether float16 is unsafe, as found on `images` (B, C, H, W) in [-1, 1], where they are.
    """
    shift = None if model.config.shift_factor is None else statistics.mean
    measured = {} if scale_stays else {"scaling_factor": statistics.scaling_factor, "shift_factor": shift}
    model.config = replace(model.config, sample_size=summary["resolution"], **measured)
    audit = audit_precision(model.to(images.device), list(images[:AUDITED].split(1)))
    model.config = replace(model.config, force_upcast=not audit.is_safe)
    notes = Notes(latents=statistics.summary(), training=summary | {"precision": audit.verdict})
    return [
        save_autoencoder(model, folder / "diffusers", format="diffusers", notes=notes),
        save_autoencoder(model, folder / f"{folder.parents[1].name}.vae.safetensors", format="ldm", notes=notes),
    ]


def describe(config: dict[str, Any], updates: int, weights: str = "EMA") -> dict[str, Any]:
    """How the `weights` came to be, for those they are handed to: no paths, no names of machines."""
    data, loss, optim = config["data"], config["loss"], config["optim"]
    return {
        "weights": weights,
        "updates": updates,
        "resolution": data["resolution"],
        "batch_size_per_process": data["batch_size"],
        "loss": {"pixel": loss["pixel"], "weights": loss["weights"]},
        "learning_rate": optim["learning_rate"],
        "ema_decay": optim["ema_decay"],
        "seed": config["seed"],
        "frozen": config["frozen"],
        "vae": vae.__version__,
        "torch": torch.__version__,
    }


def export_checkpoint(
    run: Path, checkpoint: Path, device: torch.device, images: str | None = None, *, live: bool = False
) -> tuple[list[Path], AutoencoderConfig]:
    """What `export` would have written at `checkpoint` of `run`; `live` takes the weights as they were, not averaged.

    Measured on the run's validation images, or on those of the folder `images`. Returns the configuration too.
    """
    config = {"init": None, "frozen": []} | read_json(run / CONFIG_FILE)  # older runs had neither
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
    updates = read_progress(checkpoint).updates
    summary = describe(config, updates, "live" if live else "EMA")
    judged = to_model_range(first_images(held_out, data, channels).to(device))
    mark = "live_" if live else ""  # beside the averaged ones, and never taken for them
    folder = run / EXPORTS / f"{mark}{step_name(updates)}"
    freeze(model, config["frozen"])
    scale_stays = config["init"] is not None and not posterior_learns(model)
    paths = publish(model, folder, summary, statistics, judged, scale_stays=scale_stays)
    return paths, model.config


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
