"""The directory of a run: made once, never overwritten, gone on in only with the configuration it was made with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vae.checkpoints.safe import WeightsError, write_text
from vae.config import TrainConfig
from vae.errors import InputError

CONFIG_FILE = "config.json"
MAY_CHANGE = (  # at resume: where it runs, how long, what it writes; not what it computes
    "name",
    "output",
    "resume",
    "updates",
    "validate_every",
    "logger",
    "compile",
    "channels_last",
    "gradient_checkpointing",
    "data.workers",
    "trainer.",
)


def folder_of(config: TrainConfig) -> Path:
    return Path(config.resume) if config.resume is not None else Path(config.output) / config.name


def open_folder(config: TrainConfig, *, is_first: bool) -> Path | None:
    """Make the run's directory, or find it for `resume`; returns the checkpoint to go on from.

    Only the first of several processes (`is_first`) writes.
    """
    folder = folder_of(config)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if config.resume is not None:
        if not checkpoint.is_file():
            raise InputError(f"resume={config.resume!r}: no checkpoints/last.ckpt in it; name the directory of a run")
        _check_unchanged(config, folder / CONFIG_FILE)
        return checkpoint
    if is_first:
        if checkpoint.exists():
            raise InputError(
                f"name={config.name!r}: {folder} already holds a run; choose another name or resume={folder}"
            )
        try:
            write_text(folder / CONFIG_FILE, json.dumps(asdict(config), indent=2) + "\n")
        except WeightsError as error:
            raise InputError(
                f"output={config.output!r}: cannot write there ({error}); choose another folder"
            ) from error
    return None


def updates_in(checkpoint: Path) -> int:
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # a damaged file can fail in any way
        older = f"point {checkpoint.name} at an older step_*.ckpt beside it"
        raise InputError(f"{checkpoint}: not a readable checkpoint ({type(error).__name__}); {older}") from error


def _check_unchanged(config: TrainConfig, saved: Path) -> None:
    before, now = _flat(json.loads(saved.read_text(encoding="utf-8"))), _flat(asdict(config))
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise InputError(
            f"resume={config.resume!r}: {'; '.join(changed)}. Repeat the run's overrides, or start a new run"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
