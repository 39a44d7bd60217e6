"""Published weight formats: the only place that knows a file name or a foreign key."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from vae.checkpoints.diffusers import CONFIG_FILE, WEIGHTS_FILE, read_config, to_diffusers_config
from vae.checkpoints.ldm import from_ldm, to_ldm
from vae.checkpoints.safe import (
    WeightsError,
    check_keys,
    check_tensors,
    read_safetensors,
    write_safetensors,
    write_text,
)
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL

__all__ = ["FORMATS", "WeightsError", "load_autoencoder", "save_autoencoder"]

FORMATS = ("diffusers", "ldm")
CONFIG_KEY = "vae.config"  # our configuration as JSON in a safetensors file's metadata


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


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The model in a diffusers folder or in a single file written by `save_autoencoder`, in eval mode, on the CPU."""
    path = Path(path)
    if path.is_dir():
        config = read_config(path / CONFIG_FILE)
        path = path / WEIGHTS_FILE
        state, _ = read_safetensors(path)
    else:
        state, metadata = read_safetensors(path)
        if CONFIG_KEY not in metadata:
            raise WeightsError(f"{path}: no {CONFIG_KEY} in its metadata; name the diffusers folder instead")
        config = AutoencoderConfig(**json.loads(metadata[CONFIG_KEY]))
        state = from_ldm(state, config)
    with torch.device("meta"):
        model = AutoencoderKL(config)
    expected = model.state_dict()
    check_keys(path, set(state), set(expected))
    check_tensors(path, state, expected.__getitem__)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    return model.requires_grad_(True).eval()
