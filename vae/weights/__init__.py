"""Read and write autoencoders in the published weight formats.

No other part of the project knows a file name of these formats or a foreign name of a tensor.
"""

import json
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vae.config.model import ARCHITECTURES, AutoencoderConfig
from vae.errors import InputError
from vae.files import State, WeightsError, replacing
from vae.models.base import Autoencoder
from vae.weights.formats import CONFIG_FILE, WEIGHTS_FILE, find_autoencoder, format_of, to_diffusers_config
from vae.weights.load import PREFERRED, find_export, read_source
from vae.weights.loaded import (
    ASSUMED,
    LoadedWeights,
    Notes,
    check_complete,
    check_finite,
    noting_the_scale,
    read_json,
    to_metadata,
)
from vae.weights.model_card import CARD_FILE, may_be_written, model_card
from vae.weights.safetensors_io import Piece, narrowed, pieces_of, write_pieces

__all__ = [
    "FORMATS",
    "LoadedWeights",
    "Notes",
    "WeightsError",
    "load_autoencoder",
    "read_autoencoder",
    "save_autoencoder",
    "save_found",
]

FORMATS = ("diffusers", *(one.file_format for one in ARCHITECTURES.values()))
SINGLE_FILE = ".safetensors"
OTHER_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft", ".gguf")  # of files that are never written
HALF_FILE = WEIGHTS_FILE.replace(".safetensors", ".fp16.safetensors")


def save_autoencoder(
    model: Autoencoder,
    path: str | Path,
    format: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    notes: Notes | None = None,
    *,
    family: str | None = None,
) -> Path:
    """Write `model` as a diffusers folder or as one file, and return `path`.

    `format="diffusers"` writes the folder. It has a float16 variant beside the plain weights, so that a program finds
    whichever of the two it asks for. `format="ldm"` writes a KL autoencoder to one file, `NAME.safetensors`, in LDM's
    names. `format="taesd"` writes a tiny one to one file in ComfyUI's names or, where `path` is
    `NAME_decoder.safetensors` or `NAME_encoder.safetensors`, to the published pair; both files are then written.

    The weights are cast to `dtype`. `notes` go into the metadata beside the configuration. `family`, "sd" or another of
    `FAMILIES`, states whose latents a tiny autoencoder has, which ComfyUI's file needs. An existing file is replaced
    only when the new one is complete. Raises InputError for a format that does not fit, and WeightsError where `dtype`
    cannot hold the weights or the file cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"format={format!r}, expected one of {list(FORMATS)}")
    fitting = model.config.file_format
    if format not in ("diffusers", fitting):
        raise InputError(f"format={format!r}, expected 'diffusers' or {fitting!r} for this architecture")
    if format != "diffusers" and path.suffix != SINGLE_FILE:
        raise InputError(f"{path}: name it NAME.vae{SINGLE_FILE}; web UIs refuse other kinds of file")

    noted = noting_the_scale(notes or Notes(), model.config)
    _write(path, format, _Export(dict(model.state_dict()), model.config, noted, family), dtype)
    return path


def save_found(found: LoadedWeights, path: Path, dtype: torch.dtype | None = None) -> str:
    """Write weights that were read to another path, and return the format.

    The name decides the format, as in `save_autoencoder`: `NAME.safetensors` is one file, anything else is a diffusers
    folder. Without a `dtype` every tensor keeps its own. Raises InputError where `path` has another suffix of weights,
    or where writing would lose other tensors in the file that was read.
    """
    if path.suffix in OTHER_SUFFIXES:
        raise InputError(f"{path}: name it NAME.vae{SINGLE_FILE} for one file, or without suffix for a folder")
    if found.others and path.exists() and path.resolve() in (found.file.resolve(), found.file.resolve().parent):
        raise InputError(f"{path}: holds {found.others} tensors beside the autoencoder, which would be lost")

    format = found.config.file_format if path.suffix == SINGLE_FILE else "diffusers"
    notes = noting_the_scale(found.notes, found.config)
    _write(path, format, _Export(found.state, found.config, notes, found.family), dtype)
    return format


def load_autoencoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    config: AutoencoderConfig | None = None,
    ema: bool = False,
    family: str | None = None,
) -> Autoencoder:
    """Load the autoencoder in any published layout, in eval mode, on the CPU. Nothing in the file is executed.

    `path` is a run's directory (its best export is taken, else its newest), a diffusers folder, a file in LDM's names,
    or a full SD checkpoint. A tiny autoencoder can be a diffusers folder, either file of the published pair, or
    ComfyUI's single file. Files are safetensors or PyTorch's pickles.

    `config` replaces the architecture that is stated beside or inside the file or read from its tensors. `ema` takes
    the EMA weights of a training checkpoint. `family`, "sd" or another of `FAMILIES`, states the scaling factor where
    the file does not. Without it the `config.scale_is_known` of such a model is False, and whatever uses the factor
    warns. Raises InputError where nothing usable is there.
    """
    found = read_autoencoder(find_export(path, "path"), config=config, ema=ema)
    return (found if family is None else found.of_family(family)).build(dtype)


def read_autoencoder(
    path: str | Path, *, config: AutoencoderConfig | None = None, ema: bool = False, finite: bool = True
) -> LoadedWeights:
    """Read and check the tensors of an autoencoder, as stored, without building the model.

    `path`, `config` and `ema` are those of `load_autoencoder`, except that `path` is not a run's directory.
    `finite=False` accepts NaN and infinite values, for callers that want to inspect them. Raises WeightsError where the
    weights are not usable.
    """
    found = find_autoencoder(read_source(Path(path).expanduser()), config, ema=ema)
    if config is None and ASSUMED.keys() & found.notes.latents.keys():  # a file of ours with an assumed scale
        found = replace(found, config=found.config.assuming_its_scale())
    check_complete(found)
    if finite:
        check_finite(found)
    return found


def lost_in_half(folder: Path) -> str | None:
    """Describe what float16 took from the weights of a folder that was written, or return None.

    Nothing is described where the folder has no float16 variant, or where nothing was lost but rounding.
    """
    if not (folder / HALF_FILE).is_file():
        return None
    return narrowed(read_autoencoder(folder).state, torch.float16).words


class _Export(NamedTuple):
    """What goes into a file: tensors under our names, their configuration, notes, and the family of a tiny one."""

    state: State
    config: AutoencoderConfig
    notes: Notes
    family: str | None = None


def _write(path: Path, format: str, export: _Export, dtype: torch.dtype | None) -> None:
    """Write an export in one format. All files of a pair are complete before the first takes its name."""
    if format == "diffusers":
        return _write_folder(path, export, dtype)

    theirs = format_of(export.config.architecture)
    files = theirs.to_files(export.state, export.config, path, export.family)
    written = {file: pieces_of(file, state, dtype) for file, state in files.items()}
    for file, state in files.items():
        written[file] |= {name: Piece.of(state[name]) for name in theirs.never_cast if name in state}

    with ExitStack() as opened:
        for file, pieces in written.items():
            write_pieces(opened.enter_context(replacing(file)), pieces, to_metadata(export.config, export.notes), file)
    return None


def _write_folder(folder: Path, export: _Export, dtype: torch.dtype | None) -> None:
    """Write a diffusers folder: both variants of the weights, the configuration and the model card.

    All files are complete before the first takes its name, and the configuration takes its name last.
    """
    _check_folder(folder, export.config.kind.network)

    metadata = to_metadata(export.config, export.notes)
    config = json.dumps(to_diffusers_config(export.config), indent=2) + "\n"
    plain, half = folder / WEIGHTS_FILE, folder / HALF_FILE

    try:
        in_half = pieces_of(half, export.state, torch.float16)
    except WeightsError as error:
        in_half = None
        warnings.warn(f"no float16 variant: {error}", stacklevel=4)

    # The stack renames in reverse order, so the configuration is opened first.
    with ExitStack() as files:
        described = files.enter_context(replacing(folder / CONFIG_FILE))
        for path, pieces in ((plain, pieces_of(plain, export.state, dtype)), (half, in_half)):
            if pieces is not None:
                write_pieces(files.enter_context(replacing(path)), pieces, metadata, path)
        described.write_text(config, encoding="utf-8")
        if may_be_written(folder / CARD_FILE):
            parameters = sum(tensor.numel() for tensor in export.state.values())
            card = files.enter_context(replacing(folder / CARD_FILE))
            card.write_text(model_card(export.config, export.notes, parameters, export.family), encoding="utf-8")

    # A float16 variant of the weights that were there before would not fit the new ones.
    if in_half is None:
        half.unlink(missing_ok=True)


def _check_folder(folder: Path, kind: str) -> None:
    """Refuse a folder that is not an autoencoder's.

    Raises InputError where diffusers could load other weights in it instead of ours, or where its `config.json`
    describes another kind of model.
    """
    others = [name for name in PREFERRED if name not in (WEIGHTS_FILE, HALF_FILE) and (folder / name).exists()]
    if others:
        raise InputError(f"{folder}: has {others[0]}, which diffusers may load instead; choose another folder")

    described = folder / CONFIG_FILE
    if described.exists() and read_json(described).get("_class_name") != kind:
        raise InputError(f"{folder}: its {CONFIG_FILE} is another thing's and would be lost; choose another folder")
