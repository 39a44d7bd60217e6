"""Published weight formats: the only place that knows a file name or a foreign key."""

import json
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vae.checkpoints.detect import find_autoencoder
from vae.checkpoints.diffusers import CONFIG_FILE, WEIGHTS_FILE, to_diffusers_config
from vae.checkpoints.files import PREFERRED, read_source
from vae.checkpoints.found import Found, check_complete, check_finite
from vae.checkpoints.ldm import to_ldm
from vae.checkpoints.metadata import ASSUMED, Notes, read_json, to_metadata
from vae.checkpoints.safe import State, WeightsError, replacing
from vae.checkpoints.writing import pieces_of, write_pieces, write_safetensors
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL

__all__ = [
    "FORMATS",
    "Found",
    "Notes",
    "WeightsError",
    "load_autoencoder",
    "read_autoencoder",
    "save_autoencoder",
    "save_found",
]

FORMATS = ("diffusers", "ldm")
SINGLE_FILE = ".safetensors"
OTHER_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft", ".gguf")  # files that are never written
HALF_FILE = WEIGHTS_FILE.replace(".safetensors", ".fp16.safetensors")


def save_autoencoder(
    model: AutoencoderKL,
    path: str | Path,
    format: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    notes: Notes | None = None,
) -> Path:
    """Write `model` to a diffusers folder or to one LDM file (`NAME.safetensors`); returns the path.

    The folder has the float16 variant beside the plain weights, for those who ask for it and those who do not. An
    existing file is replaced only when the new one is complete. `notes` go into the metadata with the configuration.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"format={format!r}, expected one of {list(FORMATS)}")
    if format == "ldm" and path.suffix != SINGLE_FILE:
        raise InputError(f"{path}: name it NAME.vae{SINGLE_FILE}; web UIs refuse other kinds of file")
    _write(path, format, _Export(dict(model.state_dict()), model.config, notes or Notes()), dtype)
    return path


def save_found(found: Found, path: Path, dtype: torch.dtype | None = None) -> str:
    """Write what was read to another place, in the layout that `path` asks for by its name; returns that layout.

    `NAME.safetensors` is one LDM file, all else a diffusers folder. Without a `dtype` every tensor keeps its own.
    """
    if path.suffix in OTHER_SUFFIXES:
        raise InputError(f"{path}: name it NAME.vae{SINGLE_FILE} for one file, or without suffix for a folder")
    if found.others and path.exists() and path.resolve() in (found.file.resolve(), found.file.resolve().parent):
        raise InputError(f"{path}: holds {found.others} tensors beside the autoencoder, which would be lost")
    format = "ldm" if path.suffix == SINGLE_FILE else "diffusers"
    notes = found.notes if found.scale_is_known else replace(found.notes, latents=found.notes.latents | ASSUMED)
    _write(path, format, _Export(found.state, found.config, notes), dtype)
    return format


def load_autoencoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    config: AutoencoderConfig | None = None,
    ema: bool = False,
) -> AutoencoderKL:
    """The autoencoder in any published layout, in eval mode, on the CPU; nothing in the file is executed.

    A diffusers folder, an LDM file, or a full SD checkpoint; safetensors or PyTorch's pickles. `config` replaces the
    architecture found beside, inside or by the tensors; `ema` takes a training checkpoint's averaged weights.
    """
    return read_autoencoder(path, config=config, ema=ema).build(dtype)


def read_autoencoder(
    path: str | Path, *, config: AutoencoderConfig | None = None, ema: bool = False, finite: bool = True
) -> Found:
    """`load_autoencoder` short of the model: its tensors as stored, checked, and where they came from.

    `finite=False` lets NaN and infinite values pass, for those who want to look at them.
    """
    found = find_autoencoder(read_source(Path(path).expanduser()), config, ema=ema)
    check_complete(found)
    if finite:
        check_finite(found)
    return found


class _Export(NamedTuple):
    """What goes into a file, under our names."""

    state: State
    config: AutoencoderConfig
    notes: Notes


def _write(path: Path, format: str, export: _Export, dtype: torch.dtype | None) -> None:
    if format == "ldm":
        pieces = pieces_of(path, to_ldm(export.state, export.config), dtype)
        write_safetensors(path, pieces, to_metadata(export.config, export.notes))
    else:
        _write_folder(path, export, dtype)


def _write_folder(folder: Path, export: _Export, dtype: torch.dtype | None) -> None:
    """All files are written before the first takes its name, and the configuration takes its own last."""
    _check_folder(folder)
    state, metadata = export.state, to_metadata(export.config, export.notes)
    plain, half = folder / WEIGHTS_FILE, folder / HALF_FILE
    try:
        in_half = pieces_of(half, state, torch.float16)
    except WeightsError as error:
        in_half = None
        warnings.warn(f"no float16 variant: {error}", stacklevel=4)
    with ExitStack() as files:
        described = files.enter_context(replacing(folder / CONFIG_FILE))
        for path, pieces in ((plain, pieces_of(plain, state, dtype)), (half, in_half)):
            if pieces is not None:
                write_pieces(files.enter_context(replacing(path)), pieces, metadata, path)
        described.write_text(json.dumps(to_diffusers_config(export.config), indent=2) + "\n", encoding="utf-8")
    if in_half is None:
        half.unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose other contents diffusers would mix up with ours, or that is another thing's."""
    others = [name for name in PREFERRED if name not in (WEIGHTS_FILE, HALF_FILE) and (folder / name).exists()]
    if others:
        raise InputError(f"{folder}: has {others[0]}, which diffusers may load instead; choose another folder")
    described = folder / CONFIG_FILE
    if described.exists() and read_json(described).get("_class_name") != "AutoencoderKL":
        raise InputError(f"{folder}: its {CONFIG_FILE} is another thing's and would be lost; choose another folder")
