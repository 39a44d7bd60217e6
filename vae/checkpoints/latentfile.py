"""Latents on disk, one image a file, in the form of ComfyUI's .latent files so that they open there too."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae.checkpoints.families import FAMILIES
from vae.checkpoints.safe import WeightsError
from vae.checkpoints.tensorfile import read_index
from vae.checkpoints.tiny import AS_TINY
from vae.checkpoints.writing import Piece, write_safetensors
from vae.models.autoencoder import AutoencoderConfig

SUFFIX = ".latent"
RAW = "latent_tensor"  # ComfyUI's key, for raw latents
MARK = "latent_format_version_0"  # without this empty tensor ComfyUI takes them for scaled by SD's factor
SCALED = "scaled_latents"  # a key of ours, so that nobody takes scaled latents for raw ones
DESCRIBED = "vae.latents"  # key of the metadata
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
TINY_SHAPE = {**AS_TINY, "block_out_channels": [64] * 4}  # whichever: of a tiny maker the scale is asked for


def write_latents(path: Path, latents: Tensor, config: AutoencoderConfig, *, scaled: bool, drawn: str) -> None:
    """`latents` (1, C, h, w); the metadata says whether they are scaled, by what, and how they were `drawn`.

    A scale that is not known is not written; `scaled` latents must not be of such a one.
    """
    assert config.scale_is_known or not scaled
    tensors = {SCALED: latents} if scaled else {RAW: latents, MARK: torch.empty(0)}
    about = {"scaled": scaled, "drawn": drawn, "architecture": config.architecture}
    described = json.dumps(about | scale_of(config), sort_keys=True)
    write_safetensors(path, {name: Piece.of(tensor) for name, tensor in tensors.items()}, {DESCRIBED: described})


def scale_of(config: AutoencoderConfig) -> dict[str, Any]:
    """What files of latents say of their scale: nothing where it is not known."""
    return {key: value for key, value in asdict(config).items() if key in SCALE_KEYS} if config.scale_is_known else {}


def stated_scale(about: Mapping[str, Any]) -> dict[str, Any]:
    """What `scale_of` has put into a file; raises KeyError where a part of it is missing."""
    return {key: about[key] for key in SCALE_KEYS} if SCALE_KEYS[0] in about else {}


def scale_in(path: Path, channels: int) -> AutoencoderConfig | None:
    """A configuration of the architecture and the scale of what made the latents in a file; None where it tells none.

    Raises WeightsError where what it tells cannot be.
    """
    described = read_index(path).metadata.get(DESCRIBED)
    if described is None:
        return None
    try:
        about = json.loads(described)
        if about["scaled"] in (True, False) and SCALE_KEYS[0] not in about:
            return None
        scale = stated_scale(about)
        unscaled = {**dict.fromkeys(SCALE_KEYS), SCALE_KEYS[0]: 1.0}
        usual = "tiny" if scale == unscaled else "kl"  # early files do not tell the architecture
        shape = TINY_SHAPE if about.get("architecture", usual) == "tiny" else {}
        return AutoencoderConfig(**{**shape, "latent_channels": channels, **scale})
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise WeightsError(f"{path}: its {DESCRIBED} is not readable ({error}); encode the image again") from error


def read_latents(path: Path, channels: int) -> tuple[Tensor, bool]:
    """(float32 latents (B, channels, h, w), whether they are scaled), of ours or ComfyUI's."""
    index = read_index(path)
    key = next((key for key in (RAW, SCALED) if key in index.entries), None)
    if key is None:
        raise WeightsError(
            f"{path}: neither {RAW} nor {SCALED} in it; expected a {SUFFIX} file of vae encode or ComfyUI's"
        )
    latents = index.read(key).float()
    if latents.ndim != 4 or latents.shape[1] != channels:
        shape = tuple(latents.shape)
        raise WeightsError(f"{path}: latents are {shape}, expected (images, {channels}, height, width) for this model")
    if not latents.isfinite().all():
        raise WeightsError(f"{path}: latents hold NaN or infinite values; encode the image again")
    if key == RAW and MARK not in index.entries:
        latents = latents / FAMILIES["sd"][0]
    return latents, key == SCALED
