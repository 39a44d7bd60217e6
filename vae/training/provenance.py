"""What an export says of its training, for those it is handed to: no paths, no names of machines."""

import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vae
from vae.checkpoints.card import HUB_NAME
from vae.checkpoints.exports import find_export
from vae.checkpoints.files import PIPELINE_PART, PREFERRED, read_file
from vae.checkpoints.metadata import read_json
from vae.checkpoints.safe import write_text
from vae.checkpoints.tiny import HALVES, PAIR_FILE, file_of_half, is_half, pair_in
from vae.config import CONFIG_FILE, TrainConfig
from vae.data.sources import Photos, Source
from vae.metrics.registry import METRICS
from vae.models.interface import Autoencoder
from vae.models.latent_channels import keeps_channels
from vae.training.frozen import decoder_learns, posterior_learns
from vae.training.start import Start

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


def record_origin(start: Start, run: Path, sources: tuple[Source, Source], *, resumed: bool) -> None:
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
            origin[name] = _weights(find_export(path, key))
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


def _weights(path: Path) -> dict[str, Any]:
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
