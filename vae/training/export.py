"""What an export says of its training, for those it is handed to: no paths, no names of machines.

The published weights of a run: at its end, or later from one of its checkpoints."""

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

import vae
from vae.config.data import DataConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import CONFIG_FILE, TrainConfig
from vae.data.build import open_sources
from vae.data.loader import first_images, validation_loader
from vae.data.sources import Photos, Source
from vae.data.transforms import to_model_range
from vae.errors import InputError
from vae.files import write_text
from vae.latents import LatentStatistics, measure_latents
from vae.metrics.registry import METRICS
from vae.models.base import Autoencoder
from vae.models.registry import build_autoencoder
from vae.models.resize_latents import keeps_channels
from vae.precision.audit import audit_precision
from vae.training.initialise import InitialState
from vae.training.module import AutoencoderModule, images_per_update
from vae.training.optim import decoder_learns, freeze, posterior_learns
from vae.training.resume import read_progress
from vae.training.run_dir import step_name
from vae.training.validation import AUDITED
from vae.weights import ONE_FILE, save_autoencoder
from vae.weights.detect import find_autoencoder
from vae.weights.load import PIPELINE_PART, PREFERRED, find_export, read_file
from vae.weights.loaded import LoadedWeights, Notes, WeightsFile, check_complete, check_finite, read_json
from vae.weights.model_card import CARD_FILE, HUB_NAME, may_be_written, model_card
from vae.weights.pickle_io import read_pickle
from vae.weights.taesd import HALVES, PAIR_FILE, file_of_half, is_half, pair_in

ORIGIN_FILE = "origin.json"  # of a run: what only its beginning knows
CHANNELS_OF_INIT, SCALE_IS_ASSUMED = "latent_channels_of_init", "scale_is_assumed"  # keys in it, of what exports need
STARTS = {"base": "init", "teacher": "teacher"}  # {what is said of it: the key that names it}
CUT = "short side to {resolution} px, PIL bicubic, antialiased, central square"  # of the protocol default-v1
KEYS_OF = {  # of the loss, by how they begin: without its term none of them counts
    "pixel": ("pixel",),
    "perceptual": ("perceptual",),
    "kl": ("kl",),
    "activation": ("activation",),
    "adversarial": ("adversarial", "adaptive", "autoencoder_start", "discriminator", "r1", "lecam", "augment"),
}
CACHED = re.compile(r"models--(.+)")  # a folder of the hub's cache, with -- for the slash


def record_origin(start: InitialState, run: Path, sources: tuple[Source, Source], *, resumed: bool) -> None:
    """How many images there are to train and to validate on, and which weights are begun from, by their SHA-256.

    And the family whose latents tiny ones have, where they tell; a teacher or new channels make them others. And the
    channels of init, where some were asked for, and whether the scale is a guess. A run that is `resumed` has said so;
    what it began from may be gone.
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
    if start.found is not None and are_the_same and config.model.architecture == "tiny":
        origin["family"] = start.found.family
    write_text(run / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")


def describe(  # noqa: PLR0917
    config: dict[str, Any],
    run: Path,
    updates: int,
    images_per_update: int,
    autoencoder: Autoencoder,
    weights: str = "EMA",
) -> dict[str, Any]:
    """How the `weights` of `run`, trained as `config` says, came to be. What is not known is not there.

    What learns is read off `autoencoder`, whose frozen parts are.
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
        "vae": vae.__version__,
        "torch": torch.__version__,
    }
    origin = read_json(run / ORIGIN_FILE) if (run / ORIGIN_FILE).is_file() else {}
    return {name: value for name, value in (known | origin).items() if value not in (None, "", [])}


def validation_of(measured: Mapping[str, float], images: int, resolution: int) -> dict[str, Any]:
    """What was measured of so many images, and by which protocol. Empty where nothing was."""
    metrics = {name: measured[name] for name in METRICS if math.isfinite(measured.get(name, math.nan))}
    protocol = f"default-v1: averaged weights, posterior mode, {images} images, {CUT.format(resolution=resolution)}"
    return {"validation": {"protocol": protocol, "metrics": metrics}} if metrics else {}


def logged_at(run: Path, updates: int) -> dict[str, float]:
    """What the validation at that update measured, from metrics.csv; empty where there was none."""
    if not (run / "metrics.csv").is_file():
        return {}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        row = next((row for row in csv.DictReader(file) if row["updates"] == str(updates)), {})
    return {name.removeprefix("val/"): float(value) for name, value in row.items() if "val/" in name and value}


def as_logged(measured: Mapping[str, float]) -> dict[str, float]:
    """As float32 has them: so Lightning logs them, and an export made later reads them back."""
    return {name: torch.tensor(value, dtype=torch.float32).item() for name, value in measured.items()}


def _loss(config: dict[str, Any], autoencoder: Autoencoder) -> dict[str, Any]:
    """Of the terms that are computed; without the path to LPIPS's weights."""
    is_taught, learns = config.get("teacher") is not None, posterior_learns(autoencoder)
    decodes = not is_taught or decoder_learns(autoencoder)
    computed = dict.fromkeys(("pixel", "perceptual", "adversarial"), decodes)
    computed |= {"latent": learns and is_taught, "kl": learns and not is_taught and autoencoder.is_variational}
    weights = {name: value for name, value in config["loss"]["weights"].items() if value and computed.get(name, True)}
    keys = tuple(key for term, owned in KEYS_OF.items() if term not in weights for key in owned)
    rest = {name: value for name, value in config["loss"].items() if not name.startswith((*keys, "perceptual_weights"))}
    return rest | {"weights": weights}


def _named(config: TrainConfig, images: Source) -> dict[str, str]:
    """The images of a program have no name here, whatever `data` says."""
    root = config.data.root
    if isinstance(images, Photos):
        return {"source": "the photographs inside scikit-image's wheel"}
    if config.data.source != "huggingface" or root is None or Path(root).expanduser().exists():
        return {}
    return {"hub_name": root} if HUB_NAME.fullmatch(root) else {}


def _weights_facts(path: Path) -> dict[str, Any]:
    """Of a published pair both: the half that was named, of a folder the decoder, and its other half."""
    inside = [folder / name for folder in (path, path / PIPELINE_PART) for name in PREFERRED]
    file = next((file for file in (path, *inside) if file.is_file()), None) or pair_in(path)
    assert file is not None  # it has been read
    other = _other_half(file)
    cached = next((match[1] for part in path.parts if (match := CACHED.fullmatch(part))), "")
    hub_name = {"hub_name": cached.replace("--", "/", 1)} if cached else {}
    return _hashed(file) | ({"other_half": _hashed(other)} if other else {}) | hub_name


def _other_half(file: Path) -> Path | None:
    """Of a pair by its content too: a whole autoencoder may have such a name."""
    named = PAIR_FILE.fullmatch(file.name)
    if named is None:
        return None
    (other,) = (file_of_half(file, half) for half in HALVES if half != named["half"])
    return other if other.is_file() and is_half(read_file(file)[0]) else None


def _hashed(file: Path) -> dict[str, str]:
    with file.open("rb") as content:
        return {"file": _called(file), "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _called(file: Path) -> str:
    """Of a run's export from the run's folder on: more than the name that diffusers gives to all, and no machine's."""
    exports = (folder for folder in file.absolute().parents if folder.name == "exports")
    run = next((folder.parent for folder in exports if (folder.parent / CONFIG_FILE).is_file()), None)
    return file.name if run is None else file.absolute().relative_to(run.parent).as_posix()


EXPORTS = "exports"  # of a run, in its directory
LATER: dict[str, Any] = dict.fromkeys(("init", "latent_channels", "teacher")) | {
    "frozen": [],
    "trained": [],
}  # not in older runs
Part = TypeVar("Part")


def export(training: AutoencoderModule, run: Path, name: str | None = None) -> list[Path]:
    """The averaged weights of `training`, as its last validation found them: `exports/NAME`, else by their update."""
    config = training.config
    with torch.device("meta"):
        model = build_autoencoder(config.model)
    model.load_state_dict(training.ema_model.state_dict(), strict=True, assign=True)
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


def _weights(run: Path, checkpoint: Path, config: dict[str, Any], prefix: str) -> LoadedWeights:
    state = read_pickle(checkpoint, lambda names: {name for name in names if name.startswith(prefix)})
    state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = find_autoencoder(WeightsFile(checkpoint, state), _part(run, config, "model", AutoencoderConfig))
    check_complete(found)
    check_finite(found)
    return found


def _part(run: Path, config: dict[str, Any], name: str, kind: type[Part]) -> Part:
    try:
        return kind(**config[name])
    except (KeyError, TypeError) as error:
        raise InputError(f"{run / CONFIG_FILE}: {name} is not what this version of vae writes ({error})") from error
