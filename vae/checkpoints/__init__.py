"""Published weight formats: the only place that knows a file name or a foreign key."""

import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from vae.checkpoints.detect import find_autoencoder
from vae.checkpoints.diffusers import CONFIG_FILE, WEIGHTS_FILE, to_diffusers_config
from vae.checkpoints.files import read_source
from vae.checkpoints.found import Found, check_complete, check_finite
from vae.checkpoints.ldm import to_ldm
from vae.checkpoints.metadata import Notes, to_metadata
from vae.checkpoints.safe import State, WeightsError, replacing
from vae.checkpoints.tensorfile import Piece, write_pieces, write_safetensors
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL

__all__ = ["FORMATS", "Found", "Notes", "WeightsError", "load_autoencoder", "read_autoencoder", "save_autoencoder"]

FORMATS = ("diffusers", "ldm")
HALF_FILE = WEIGHTS_FILE.replace(".safetensors", ".fp16.safetensors")
FLOAT16_MAX = torch.finfo(torch.float16).max


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
    state, metadata = dict(model.state_dict()), to_metadata(model.config, notes or Notes())
    if format == "ldm":
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: name it NAME.vae.safetensors; web UIs refuse other kinds of file")
        write_safetensors(path, _pieces(path, to_ldm(state, model.config), dtype), metadata)
    else:
        _write_folder(path, model.config, state, dtype, metadata)
    return path


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


def _write_folder(
    folder: Path, config: AutoencoderConfig, state: State, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """All files are written before the first takes its name, and the configuration takes its own last."""
    with ExitStack() as files:
        described = files.enter_context(replacing(folder / CONFIG_FILE))
        plain = files.enter_context(replacing(folder / WEIGHTS_FILE))
        write_pieces(plain, _pieces(folder / WEIGHTS_FILE, state, dtype), metadata, folder / WEIGHTS_FILE)
        try:
            half = _pieces(folder / HALF_FILE, state, torch.float16)
        except WeightsError as error:
            (folder / HALF_FILE).unlink(missing_ok=True)
            warnings.warn(f"no float16 variant: {error}", stacklevel=4)
        else:
            partial = files.enter_context(replacing(folder / HALF_FILE))
            write_pieces(partial, half, metadata, folder / HALF_FILE)
        described.write_text(json.dumps(to_diffusers_config(config), indent=2) + "\n", encoding="utf-8")


def _pieces(path: Path, state: State, dtype: torch.dtype) -> dict[str, Piece]:
    if dtype is torch.float16:
        for name, tensor in state.items():
            if tensor.numel() and tensor.abs().max() > FLOAT16_MAX:
                raise WeightsError(f"{path}: {name} exceeds float16; write bfloat16 or float32, or use --fp16-safe")
    return {name: Piece.of(tensor, dtype) for name, tensor in state.items()}
