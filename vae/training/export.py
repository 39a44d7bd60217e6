"""The published weights of a run, and what they say of their training.

`export` writes them during a run, `export_checkpoint` later from one of its checkpoints. `describe` collects the
facts for the model card. They are for people whom the weights are handed to: they contain no paths and no names of
machines.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor

from vae import __version__
from vae.config.data import DataConfig
from vae.config.loss import term_of
from vae.config.model import AutoencoderConfig
from vae.config.schema import TrainConfig, with_younger_keys
from vae.data.build import open_sources
from vae.data.loader import first_images, validation_loader
from vae.data.sources import Photos, Source
from vae.data.transforms import to_model_range
from vae.errors import InputError
from vae.files import write_text
from vae.latents import LatentStatistics, measure_latents
from vae.losses.autoencoder_loss import RECONSTRUCTION_TERMS
from vae.metrics.registry import METRICS
from vae.models.base import Autoencoder, build_autoencoder
from vae.models.resize_latents import keeps_channels
from vae.precision.audit import audit_precision
from vae.run_dir import RunDir, step_name
from vae.training.initialise import InitialState
from vae.training.module import AutoencoderModule, images_per_update
from vae.training.optim import decoder_learns, freeze, posterior_learns
from vae.training.resume import read_progress
from vae.training.validation import AUDITED
from vae.weights import save_autoencoder
from vae.weights.formats import find_autoencoder
from vae.weights.load import PIPELINE_PART, PREFERRED, find_export, read_file
from vae.weights.loaded import (
    ASSUMED_GROUPS,
    LoadedWeights,
    Notes,
    WeightsFile,
    check_complete,
    check_finite,
    read_json,
)
from vae.weights.model_card import CARD_FILE, HUB_NAME, may_be_written, model_card
from vae.weights.pickle_io import read_pickle
from vae.weights.taesd import HALVES, PAIR_FILE, file_of_half, is_half, pair_in

CHANNELS_OF_INIT = "latent_channels_of_init"  # keys of origin.json: what exports need and do not repeat
SCALE_IS_ASSUMED = "scale_is_assumed"
GROUPS_ARE_ASSUMED = "groups_are_assumed"
STARTS = {"base": "init", "teacher": "teacher"}  # {name in origin.json: config key}
CUT = "short side to {resolution} px, PIL bicubic, antialiased, central square"  # as in the protocol default-v1
CACHED = re.compile(r"models--(.+)")  # a folder of the hub's cache, with -- for the slash


def record_origin(start: InitialState, run: Path, sources: tuple[Source, Source], *, resumed: bool) -> None:
    """Write `origin.json`: what the run is trained on, and which weights it begins from.

    It has the number of training and validation images, and the SHA-256 of the weights of `init` and `teacher`. For
    a tiny autoencoder it also has the family whose latents it makes, if the weights show it and neither a teacher
    nor new channels change them. It notes the latent channels of `init` if the run asks for a number of them, and
    whether the scaling factor is a guess. A `resumed` run has written it before, and the weights may be gone by now.
    """
    if resumed:
        return
    config, (images, held_out) = start.config, sources
    counts = {"training_images": len(images), "validation_images": len(held_out)}

    origin: dict[str, Any] = {"data": _named(config, images) | counts}
    for name, key in STARTS.items():
        path = getattr(config, key)
        if path is not None:
            origin[name] = _weights_facts(find_export(path, key))

    are_the_same = config.teacher is None and keeps_channels(config.latent_channels, start.channels_before)
    if config.latent_channels is not None:
        origin[CHANNELS_OF_INIT] = start.channels_before
    if not config.model.scale_is_known:
        origin[SCALE_IS_ASSUMED] = True
    if start.groups_are_assumed:
        origin[GROUPS_ARE_ASSUMED] = True
    if start.found is not None and are_the_same and config.model.latents_are_scaled:
        origin["family"] = start.found.family

    write_text(RunDir(run).origin, json.dumps(origin, indent=2) + "\n")


def describe(  # noqa: PLR0917
    config: dict[str, Any],
    run: Path,
    updates: int,
    images_per_update: int,
    autoencoder: Autoencoder,
    weights: str = "EMA",
) -> dict[str, Any]:
    """Return how the `weights` of `run`, trained as `config` says, came to be. Unknown facts are absent.

    `config` is the run's saved configuration. `autoencoder` has its frozen parts frozen, so it shows what learned.
    """
    data = config["data"]
    known = {
        "name": run.name,
        "license": config.get("license"),
        "about": config.get("about"),
        "weights": weights,
        "updates": updates,
        "resolution": data["resolution"],
        "batch_size_per_process": data["batch_size"],
        "images_per_update": images_per_update,
        "loss": _loss(config, autoencoder),
        "optim": config["optim"],
        "precision_in_training": config["trainer"].get("precision", "32-true"),
        "seed": config["seed"],
        "frozen": config["frozen"],
        "trained": config.get("trained"),
        "latent_channels": config.get("latent_channels"),
        "fp16_safe": config.get("fp16_safe") or None,
        "vae": __version__,
        "torch": torch.__version__,
    }

    origin = read_json(RunDir(run).origin) if (RunDir(run).origin).is_file() else {}
    return {name: value for name, value in (known | origin).items() if value not in (None, "", [])}


def validation_of(measured: Mapping[str, float], images: int, resolution: int) -> dict[str, Any]:
    """Return what a validation measured on so many images, and by which protocol; empty if it measured nothing.

    `resolution` is the side of the images in pixels.
    """
    metrics = {name: measured[name] for name in METRICS if math.isfinite(measured.get(name, math.nan))}
    protocol = f"default-v1: averaged weights, posterior mode, {images} images, {CUT.format(resolution=resolution)}"
    return {"validation": {"protocol": protocol, "metrics": metrics}} if metrics else {}


def logged_at(run: Path, updates: int) -> dict[str, float]:
    """Return what the validation at update `updates` measured, from metrics.csv; empty if there was none."""
    if not (RunDir(run).metrics).is_file():
        return {}
    with (RunDir(run).metrics).open(newline="", encoding="utf-8") as file:
        row = next((row for row in csv.DictReader(file) if row["updates"] == str(updates)), {})
    return {name.removeprefix("val/"): float(value) for name, value in row.items() if "val/" in name and value}


def as_logged(measured: Mapping[str, float]) -> dict[str, float]:
    """Return the values rounded to float32.

    Lightning logs them so, and an export that is made later reads them back from the log.
    """
    return {name: torch.tensor(value, dtype=torch.float32).item() for name, value in measured.items()}


def _loss(config: dict[str, Any], autoencoder: Autoencoder) -> dict[str, Any]:
    """Return the loss settings of those terms that are computed, without the path to LPIPS's weights."""
    is_taught = config.get("teacher") is not None
    learns = posterior_learns(autoencoder)
    decodes = not is_taught or decoder_learns(autoencoder)
    computed = dict.fromkeys((*RECONSTRUCTION_TERMS, "adversarial"), decodes)
    computed |= {"latent": learns and is_taught, "kl": learns and not is_taught and autoencoder.is_variational}

    weights = {name: value for name, value in config["loss"]["weights"].items() if value and computed.get(name, True)}

    # Settings of a term that is not computed would only mislead.
    counts = {name for name in config["loss"] if term_of(name) in {"", *weights}} - {"perceptual_weights"}
    rest = {name: value for name, value in config["loss"].items() if name in counts}
    return rest | {"weights": weights}


def _named(config: TrainConfig, images: Source) -> dict[str, str]:
    """Return the public name of the training images, or nothing.

    Images that a program passes to `train` have no name here, whatever `data` says.
    """
    root = config.data.root
    if isinstance(images, Photos):
        return {"source": "the photographs inside scikit-image's wheel"}
    if config.data.source != "huggingface" or root is None or Path(root).expanduser().exists():
        return {}
    return {"hub_name": root} if HUB_NAME.fullmatch(root) else {}


def _weights_facts(path: Path) -> dict[str, Any]:
    """Return the file name and SHA-256 of the weights at `path`, and their name on the hub if they come from its cache.

    Of a published pair both halves are described: the one that was named, or the decoder if a folder was named, and
    the other.
    """
    inside = [folder / name for folder in (path, path / PIPELINE_PART) for name in PREFERRED]
    file = next((file for file in (path, *inside) if file.is_file()), None) or pair_in(path)
    assert file is not None  # the weights have been read from it

    other = _other_half(file)

    cached = next((match[1] for part in path.parts if (match := CACHED.fullmatch(part))), "")
    hub_name = {"hub_name": cached.replace("--", "/", 1)} if cached else {}
    return _hashed(file) | ({"other_half": _hashed(other)} if other else {}) | hub_name


def _other_half(file: Path) -> Path | None:
    """Return the other half of a pair, or None.

    The content must be a half too: a whole autoencoder may have such a file name.
    """
    named = PAIR_FILE.fullmatch(file.name)
    if named is None:
        return None
    (other,) = (file_of_half(file, half) for half in HALVES if half != named["half"])
    return other if other.is_file() and is_half(read_file(file)[0]) else None


def _hashed(file: Path) -> dict[str, str]:
    """Return the name and the SHA-256 of a file."""
    with file.open("rb") as content:
        return {"file": _called(file), "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _called(file: Path) -> str:
    """Return the name by which an export calls `file`.

    If it is an export of a run this is its path from the run's directory on. That says more than the file name that
    diffusers gives to all weights, and names no machine.
    """
    runs = (RunDir.of_export(folder) for folder in file.absolute().parents)
    run = next((run for run in runs if run is not None and run.config.is_file()), None)
    return file.name if run is None else file.absolute().relative_to(run.path.parent).as_posix()


Part = TypeVar("Part")


def export(training: AutoencoderModule, run: Path, name: str | None = None) -> list[Path]:
    """Write the EMA weights of `training` as its last validation found them, and return the paths of the weights.

    They go to `exports/NAME`, or to a folder named after the update.
    """
    config = training.config
    with torch.device("meta"):
        model = build_autoencoder(config.model)
    model.load_state_dict(training.ema_model.state_dict(), strict=True, assign=True)

    images = images_per_update(config, training.trainer)
    summary = describe(asdict(config), run, training.updates, images, training.autoencoder)
    folder = RunDir(run).export(name or step_name(training.updates))
    validation = training.validation
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
    """Write `model` to `folder`, one of a run's exports, and return the paths of the weights.

    It is written as a diffusers folder, if that format can hold it, and as one file. The model card is in the
    diffusers folder, or else beside the file.

    The scaling factor is the measured one, 1 / std of the validation latents; so is the shift if the model has one.
    With `scale_stays` both are the model's own: its latents are those of a published model, and diffusion models for
    it expect its scale. A tiny autoencoder also keeps its own, since its raw latents are scaled already. If the
    scale is a guess made when the run began, `summary` says so.

    `force_upcast` says whether float16 is unsafe. This is tested on `images` (B, C, H, W) in [-1, 1], on their
    device.
    """
    shift = None if model.config.shift_factor is None else statistics.mean
    kept = model.config.assuming_its_scale() if summary.get(SCALE_IS_ASSUMED) else model.config
    stays = scale_stays or model.config.latents_are_scaled
    config = kept if stays else model.config.with_scale(statistics.scaling_factor, shift)
    model.config = replace(config, sample_size=summary["resolution"])

    # The audit decides whether float16 needs `force_upcast`, on the weights as they are published.
    audit = audit_precision(model.to(images.device), list(images[:AUDITED].split(1)))
    model.config = replace(model.config, force_upcast=not audit.is_safe)

    private = {CHANNELS_OF_INIT, SCALE_IS_ASSUMED, GROUPS_ARE_ASSUMED}
    training = {name: value for name, value in summary.items() if name not in private} | {"precision": audit.verdict}
    groups = ASSUMED_GROUPS if summary.get(GROUPS_ARE_ASSUMED) else {}
    notes = Notes(latents=statistics.summary(), training=training, architecture=groups)

    # The diffusers format cannot describe a pooled mid-block.
    places = {} if model.config.mid_block_pool else {folder / "diffusers": "diffusers"}
    places |= {RunDir(folder.parents[1]).weights_file(folder.name): model.config.file_format}
    family = summary.get("family")

    paths = [save_autoencoder(model, path, format, notes=notes, family=family) for path, format in places.items()]

    if len(paths) == 1 and may_be_written(folder / CARD_FILE):
        parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        write_text(folder / CARD_FILE, model_card(model.config, notes, parameters, family))
    return paths


def export_checkpoint(
    run: Path, checkpoint: Path, device: torch.device, images: str | None = None, *, live: bool = False
) -> tuple[list[Path], AutoencoderConfig]:
    """Write what `export` would have written at `checkpoint` of `run`; return the paths and the model's configuration.

    With `live` it takes the trained weights instead of the EMA weights. Latents are measured on the run's validation
    images, or on those in the folder `images`. Raises InputError if the checkpoint or the run's configuration cannot
    be used.
    """
    # An older run lacks the keys that are younger.
    config = asdict(TrainConfig()) | with_younger_keys(read_json(RunDir(run).config))
    found = _weights(run, checkpoint, config, ("autoencoder.",) if live else ("ema_model.", "average."))

    data = _part(run, config, "data", DataConfig)
    if images is not None:
        data = data.of_folder(images)

    held_out = open_sources(data)[1]
    channels = found.config.in_channels
    loader = validation_loader(held_out, data, channels, rank=0, world_size=1)
    batches = track(loader, "Measuring latents", math.ceil(len(held_out) / data.validation_batch_size))

    model = found.build().to(device)
    whole = (to_model_range(batch.images.to(device)) for batch in batches if len(batch.images))
    statistics = measure_latents(model, whole)

    # What learned decides whether the scale stays, and what the card says.
    freeze(model, config["frozen"], config["trained"])
    learns, (updates, together, _) = posterior_learns(model), read_progress(checkpoint)
    summary = describe(config, run, updates, together, model, "live" if live else "EMA")
    if images is None and not live:  # else the logged metrics are not of these images or weights
        summary |= _validation(logged_at(run, updates), statistics, data, model.config)

    judged = to_model_range(first_images(held_out, data, channels).to(device))

    mark = "live_" if live else ""  # beside the EMA weights, and never mistaken for them
    folder = RunDir(run).export(f"{mark}{step_name(updates)}")
    scale_stays = _scale_stays(config, summary, learns=learns)
    paths = publish(model, folder, summary, statistics, judged, scale_stays=scale_stays)
    return paths, model.config


def _scale_stays(config: dict[str, Any], summary: dict[str, Any], *, learns: bool) -> bool:
    """Return whether the latents are those of a published model.

    They are if the encoder does not learn, or if it learns a teacher's latents.
    """
    channels_stay = keeps_channels(config["latent_channels"], summary.get(CHANNELS_OF_INIT))
    is_as_before = config["init"] is not None and channels_stay and not learns
    return is_as_before or config["teacher"] is not None


def _validation(
    measured: dict[str, float], statistics: LatentStatistics, data: DataConfig, model: AutoencoderConfig
) -> dict[str, Any]:
    """Return the metrics of a validation with the number of its images.

    Images that could not be read were not measured, so the images are counted by their latents.
    """
    images = statistics.count // (data.resolution // model.downsample_factor) ** 2
    return validation_of(measured, images, data.resolution)


def _weights(run: Path, checkpoint: Path, config: dict[str, Any], prefixes: tuple[str, ...]) -> LoadedWeights:
    """Read the autoencoder under one of `prefixes` from a checkpoint.

    There are two prefixes for the EMA weights, since the first version of vae called them `average`.
    """
    state = read_pickle(checkpoint, lambda names: {name for name in names if name.startswith(prefixes)})
    prefix = next((one for one in prefixes if any(name.startswith(one) for name in state)), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = find_autoencoder(WeightsFile(checkpoint, state), _part(run, config, "model", AutoencoderConfig))
    check_complete(found)
    check_finite(found)
    return found


def _part(run: Path, config: dict[str, Any], name: str, kind: type[Part]) -> Part:
    """Build one part of a run's configuration. Raises InputError if it has other keys than this version writes."""
    try:
        return kind(**config[name])
    except (KeyError, TypeError) as error:
        raise InputError(f"{RunDir(run).config}: {name} is not what this version of vae writes ({error})") from error
