"""The directory of a run, and how a run is resumed in it: only with the configuration that it was made with.

Which keys may change all the same is stated beside each field of the configuration.
"""

import glob
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae.config.data import DataConfig
from vae.config.fields import flat, walk
from vae.config.model import AutoencoderConfig
from vae.config.schema import AUTO, TrainConfig, with_younger_keys
from vae.errors import InputError, require
from vae.files import write_text
from vae.run_dir import RunDir
from vae.training.manifest import checkpoints_in, newest_whole
from vae.weights.loaded import read_json

TIME = "{time}"
RUN_NAME = "VAE_RUN_NAME"  # passes the name that the first process made to those that Lightning starts


CORRECTED = (  # a key of the loss, the values concerned, and a note for runs from before `loss.adaptive_bound`
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
    """Where a checkpoint stands. `images` is the digest of the names it was trained and validated on."""

    updates: int
    images_per_update: int
    images: str


def folder_of(config: TrainConfig) -> Path:
    """Return the directory in which the run is, or will be.

    Raises InputError if `resume` names no directory.
    """
    if config.resume is not None and config.resume != AUTO:
        folder = Path(config.resume).expanduser()
        require(folder.is_dir(), f"resume={config.resume!r}", "the directory of a run, or auto")
        return folder

    # The processes that Lightning starts must not look for a run: the first one has made or found it.
    made = os.environ.get(RUN_NAME) or config.name.replace(TIME, time.strftime("%Y-%m-%d_%H-%M-%S"))
    found = _newest_alike(config) if config.resume == AUTO and RUN_NAME not in os.environ else None
    return found or Path(config.output).expanduser() / made


def is_resumed(config: TrainConfig, folder: Path) -> bool:
    """Return whether `config` means the run that is in `folder`, and not a new one."""
    return config.resume is not None and (config.resume != AUTO or bool(checkpoints_in(RunDir(folder).checkpoints)))


def model_of(run: Path) -> AutoencoderConfig:
    """Return the architecture that is in the configuration of `run`. Raises InputError if there is none."""
    try:
        return AutoencoderConfig(**read_json(RunDir(run).config)["model"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{RunDir(run).config}: no model in it ({error}); restore it or start a new run") from error


def as_begun(config: TrainConfig, run: Path) -> TrainConfig:
    """Return `config`, with what the run that it resumes in `run` did before some keys or defaults were there.

    A run that began with the older bound of the adaptive weight keeps it, to the last bit; presets no longer contain
    that bound. It keeps its validation images too. If `config` states another value all the same, that is compared with
    the run's like any other key.
    """
    saved = RunDir(run).config
    if not is_resumed(config, run) or not saved.is_file():
        return config  # not a run: refused in better words where it is opened
    return _as_begun(config, _read(saved))


def open_folder(config: TrainConfig, folder: Path, *, is_first: bool) -> tuple[Path | None, list[str]]:
    """Make the run's directory, or find the checkpoint to resume from; return it and notes to print.

    Only the first of several processes (`is_first`) writes. Raises InputError if the directory holds a run that is
    not to be resumed, has no whole checkpoint, or was made with another configuration.
    """
    checkpoints = RunDir(folder).checkpoints
    if is_resumed(config, folder):
        if not checkpoints_in(checkpoints):
            raise InputError(
                f"resume={config.resume!r}: no checkpoint below it; name the directory of a run, or resume=auto"
            )

        changed = _changes(config, RunDir(folder).config)
        checkpoint, damaged = newest_whole(checkpoints)
        taken = [f"taking {checkpoint.name} instead"] if damaged else []
        return checkpoint, [*damaged, *taken, *changed]

    if is_first:
        if checkpoints_in(checkpoints):
            raise InputError(
                f"name={config.name!r}: {folder} already holds a run; choose another name, resume={folder}, "
                f"or resume=auto"
            )
        write_text(RunDir(folder).config, json.dumps(asdict(config), indent=2) + "\n")
    return None, []


def read_progress(checkpoint: Path) -> Progress:
    """Return where `checkpoint` stands. Raises InputError if this version of vae cannot read it."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return Progress(int(saved["global_step"]), int(saved["images_per_update"]), str(saved["images"]))
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{checkpoint}: not a checkpoint of this version of vae ({type(error).__name__})") from error


def _newest_alike(config: TrainConfig) -> Path | None:
    """Return the newest run below `output` with this name and configuration that has a checkpoint, or None."""
    pattern = glob.escape(config.name).replace(TIME, "*")  # braces mean nothing to glob
    runs = Path(config.output).expanduser().glob(f"{pattern}/{RunDir('').config}")

    alike = [
        file.parent
        for file in runs
        if checkpoints_in(RunDir(file.parent).checkpoints) and (TIME not in config.name or not _refused(config, file))
    ]
    return max(alike, key=lambda run: RunDir(run).config.stat().st_mtime, default=None)


def _changes(config: TrainConfig, saved: Path) -> list[str]:
    """Return notes on what differs from the saved configuration. Raises InputError if that must not change."""
    refused = _refused(config, saved)
    if refused:
        raise InputError(
            f"resume={config.resume!r}: {'; '.join(refused)}. Repeat the run's overrides or none, or start a new run"
        )

    changed = [line for key, line in _differences(config, saved).items() if not _metadata(key).get("quiet")]
    return [*changed, *_corrected(_read(saved))]


def _refused(config: TrainConfig, saved: Path) -> list[str]:
    """Return one line for each key that differs from the saved configuration and must not."""
    return [line for key, line in _differences(config, saved).items() if not _metadata(key).get("may_change")]


def _metadata(key: str) -> Mapping[str, Any]:
    """Return the metadata of the config's field for `key`.

    A key below `trainer` is Lightning's and has the metadata of `trainer`. An unknown key is that of an older run.
    """
    known = {name: field.metadata for name, field, _ in walk(TrainConfig())}
    return known.get(key) or known.get(key.partition(".")[0], {})


def _differences(config: TrainConfig, saved: Path) -> dict[str, str]:
    """Return {key: what it was and is} for all keys that differ from the saved configuration.

    With `init` the architecture is that of `init`, so it is not compared. A key that is younger than the run had its
    default.
    """
    known = _read(saved)
    before = flat(asdict(TrainConfig())) | known
    now = flat(asdict(_as_begun(config, known)))
    return {
        key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not (config.init is not None and key.startswith("model."))
    }


def _corrected(before: dict[str, Any]) -> list[str]:
    """Return notes on settings whose rule was corrected since the run began with these values."""
    values = flat(asdict(TrainConfig())) | before
    if "loss.adaptive_bound" in before or not values["loss.weights.adversarial"]:
        return []
    return [words for key, applies, words in CORRECTED if applies(values[f"loss.{key}"])]


def _as_begun(config: TrainConfig, before: dict[str, Any]) -> TrainConfig:
    """Return `config` with what the saved configuration `before` has in place of younger defaults."""
    least = before.get("data.validation_at_least")
    if least is not None and config.data.validation_at_least == DataConfig.validation_at_least:
        config = replace(config, data=replace(config.data, validation_at_least=least))

    if config.threads is None:
        config = replace(config, threads=before.get("threads"))

    older = before.get("loss.adaptive_maximum")
    if older is None or "loss.adaptive_bound" in before or config.loss.adaptive_maximum is not None:
        return config
    return replace(config, loss=replace(config.loss, adaptive_maximum=older))


def _read(saved: Path) -> dict[str, Any]:
    """Read the configuration in a run's directory, as {"a.b": value}. Raises InputError if it is not readable."""
    try:
        return flat(with_younger_keys(json.loads(saved.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{saved}: not readable as a run's configuration ({error}); restore it or start a new run"
        ) from error
