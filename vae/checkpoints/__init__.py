"""Published weight formats: the only place that knows a file name or a foreign key."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from vae.checkpoints.detect import Found, find_autoencoder
from vae.checkpoints.diffusers import CONFIG_FILE, WEIGHTS_FILE, to_diffusers_config
from vae.checkpoints.files import CONFIG_KEY, read_model
from vae.checkpoints.ldm import to_ldm
from vae.checkpoints.safe import WeightsError, check_keys, check_tensors, write_safetensors, write_text
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL

__all__ = ["FORMATS", "Found", "WeightsError", "load_autoencoder", "read_autoencoder", "save_autoencoder"]

FORMATS = ("diffusers", "ldm")


def save_autoencoder(
    model: AutoencoderKL, path: str | Path, format: str = "diffusers", dtype: torch.dtype = torch.float32
) -> Path:
    """Write `model` to a diffusers folder or to one LDM file (`NAME.safetensors`); returns the path.

    An existing file is replaced only when the new one is complete.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"format={format!r}, expected one of {list(FORMATS)}")
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    metadata = {CONFIG_KEY: json.dumps(asdict(model.config), sort_keys=True)}
    if format == "ldm":
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: name it NAME.vae.safetensors; web UIs refuse other kinds of file")
        write_safetensors(path, to_ldm(state, model.config), metadata)
    else:
        write_safetensors(path / WEIGHTS_FILE, state, metadata)
        write_text(path / CONFIG_FILE, json.dumps(to_diffusers_config(model.config), indent=2) + "\n")
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
    found = read_autoencoder(path, config=config, ema=ema)
    with torch.device("meta"):
        model = AutoencoderKL(found.config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in found.state.items()}, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def read_autoencoder(path: str | Path, *, config: AutoencoderConfig | None = None, ema: bool = False) -> Found:
    """`load_autoencoder` short of the model: its tensors as stored, checked, and where they came from."""
    file, state, stated = read_model(Path(path))
    found = find_autoencoder(file, state, config or stated, ema=ema)
    with torch.device("meta"):
        expected = AutoencoderKL(found.config).state_dict()
    check_keys(file, set(found.state), set(expected))
    check_tensors(file, found.state, expected.__getitem__)
    return found
