"""The directory of a run: one process writes there, and goes on there only with the configuration it was made with."""

import glob
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae.config.model import AutoencoderConfig
from vae.config.schema import AUTO, CONFIG_FILE, TrainConfig
from vae.errors import InputError, require
from vae.files import write_text
from vae.training.run_dir import checkpoints_in, newest_whole
from vae.weights.loaded import read_json

TIME = "{time}"
RUN_NAME = "VAE_RUN_NAME"  # the processes that Lightning starts must find the name that the first one made
MAY_CHANGE = (  # at resume, and is listed then: where it runs, how long, in which precision, what it writes
    "name",
    "output",
    "resume",
    "plan",
    "updates",
    "validate_every",
    "keep_best",
    "license",
    "about",
    "inception",
    "compare_with_init",
    "checkpoint_minutes",
    "max_minutes",
    "timeout_minutes",
    "guard.",
    "logger",
    "compile",
    "channels_last",
    "gradient_checkpointing",
    "data.root",  # the images may have moved: their names and number must be the same
    "data.validation_root",
    "data.latents",
    "teacher",
    "data.cache",
    "data.workers",
    "data.max_corrupt",
    "data.batch_size",  # with as many more processes: images_per_update is what must stay
    "trainer.",
)
SILENT = ("name", "output", "resume", "plan")  # differences that nobody needs to be told


CORRECTED = (  # a key of the loss, the values it is about, and what runs from before `loss.adaptive_bound` are told
    (
        "r1",
        lambda gamma: gamma > 0,
        "loss.r1: since this run began its penalty became that of one logit, no longer of all logits of an image "
        "together: from here on it is weaker by their number",
    ),
    (
        "discriminator.norm",
        lambda norm: norm == "batch",
        "loss.discriminator.norm='batch': since this run began images and reconstructions came to be normalised apart "
        "where the discriminator learns, as where it judges",
    ),
)


class Progress(NamedTuple):
    """Where a checkpoint stands; `images` is the digest of the names it was trained and validated on."""

    updates: int
    images_per_update: int
    images: str


def folder_of(config: TrainConfig) -> Path:
    """Where the run is, or will be."""
    if config.resume is not None and config.resume != AUTO:
        folder = Path(config.resume).expanduser()
        require(folder.is_dir(), f"resume={config.resume!r}", "the directory of a run, or auto")
        return folder
    made = os.environ.get(RUN_NAME) or config.name.replace(TIME, time.strftime("%Y-%m-%d_%H-%M-%S"))
    found = _newest_alike(config) if config.resume == AUTO and RUN_NAME not in os.environ else None
    return found or Path(config.output).expanduser() / made


def is_resumed(config: TrainConfig, folder: Path) -> bool:
    """Whether the run that is there is meant, and not a new one."""
    return config.resume is not None and (config.resume != AUTO or bool(checkpoints_in(folder / "checkpoints")))


def model_of(run: Path) -> AutoencoderConfig:
    """As its configuration has it."""
    try:
        return AutoencoderConfig(**read_json(run / CONFIG_FILE)["model"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{run / CONFIG_FILE}: no model in it ({error}); restore it or start a new run") from error


def with_bound_of(config: TrainConfig, run: Path) -> TrainConfig:
    """`config` for going on in `run`: one that began with the adaptive weight's older bound keeps it, to the last bit.

    Presets no longer name that bound. One that is asked for all the same is compared with the run's, as other keys.
    """
    saved = run / CONFIG_FILE
    if not saved.is_file():
        return config  # no run: refused in better words where it is opened
    return _with_bound_of(config, _read(saved))


def open_folder(config: TrainConfig, folder: Path, *, is_first: bool) -> tuple[Path | None, list[str]]:
    """Make the run's directory, or find what to go on from there: (checkpoint, what to tell about it).

    Only the first of several processes (`is_first`) writes.
    """
    checkpoints = folder / "checkpoints"
    if is_resumed(config, folder):
        if not checkpoints_in(checkpoints):
            raise InputError(
                f"resume={config.resume!r}: no checkpoint below it; name the directory of a run, or resume=auto"
            )
        changed = _changes(config, folder / CONFIG_FILE)
        checkpoint, damaged = newest_whole(checkpoints)
        taken = [f"taking {checkpoint.name} instead"] if damaged else []
        return checkpoint, [*damaged, *taken, *changed]
    if is_first:
        if checkpoints_in(checkpoints):
            raise InputError(
                f"name={config.name!r}: {folder} already holds a run; choose another name, resume={folder}, "
                f"or resume=auto"
            )
        write_text(folder / CONFIG_FILE, json.dumps(asdict(config), indent=2) + "\n")
    return None, []


def read_progress(checkpoint: Path) -> Progress:
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return Progress(int(saved["global_step"]), int(saved["images_per_update"]), str(saved["images"]))
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{checkpoint}: not a checkpoint of this version of vae ({type(error).__name__})") from error


def _newest_alike(config: TrainConfig) -> Path | None:
    """The newest run below `output` with this name and configuration that has a checkpoint."""
    pattern = glob.escape(config.name).replace(TIME, "*")  # braces mean nothing to glob
    runs = Path(config.output).expanduser().glob(f"{pattern}/{CONFIG_FILE}")
    alike = [
        file.parent
        for file in runs
        if checkpoints_in(file.parent / "checkpoints") and (TIME not in config.name or not _refused(config, file))
    ]
    return max(alike, key=lambda run: (run / CONFIG_FILE).stat().st_mtime, default=None)


def _changes(config: TrainConfig, saved: Path) -> list[str]:
    """What differs from the saved configuration and may; refuses what may not."""
    refused = _refused(config, saved)
    if refused:
        raise InputError(
            f"resume={config.resume!r}: {'; '.join(refused)}. Repeat the run's overrides or none, or start a new run"
        )
    changed = [line for key, line in _differences(config, saved).items() if not key.startswith(SILENT)]
    return [*changed, *_corrected(_read(saved))]


def _refused(config: TrainConfig, saved: Path) -> list[str]:
    return [line for key, line in _differences(config, saved).items() if not key.startswith(MAY_CHANGE)]


def _differences(config: TrainConfig, saved: Path) -> dict[str, str]:
    """{key: what it was and is}. The architecture is that of `init`, where there is one.

    A key younger than the run had no other value than the default.
    """
    known = _read(saved)
    before, now = _flat(asdict(TrainConfig())) | known, _flat(asdict(_with_bound_of(config, known)))
    return {
        key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not (config.init is not None and key.startswith("model."))
    }


def _corrected(before: dict[str, Any]) -> list[str]:
    """What a run that began with these values learns by another rule from now on."""
    values = _flat(asdict(TrainConfig())) | before
    if "loss.adaptive_bound" in before or not values["loss.weights.adversarial"]:
        return []
    return [words for key, applies, words in CORRECTED if applies(values[f"loss.{key}"])]


def _with_bound_of(config: TrainConfig, before: dict[str, Any]) -> TrainConfig:
    older = before.get("loss.adaptive_maximum")
    if older is None or "loss.adaptive_bound" in before or config.loss.adaptive_maximum is not None:
        return config
    return replace(config, loss=replace(config.loss, adaptive_maximum=older))


def _read(saved: Path) -> dict[str, Any]:
    """The configuration in a run's directory: {"a.b": value}."""
    try:
        return _flat(json.loads(saved.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{saved}: not readable as a run's configuration ({error}); restore it or start a new run"
        ) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
