"""The folder layout of diffusers: `config.json` beside the weights, whose names are ours."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vae.checkpoints.metadata import read_json
from vae.checkpoints.safe import WeightsError
from vae.models.autoencoder import AutoencoderConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WRITTEN_FOR = "0.32.0"  # the oldest diffusers whose AutoencoderKL has every field written here
PLAIN_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
ATTENTION_BLOCKS = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
THEIR_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}  # where they are not ours


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Every field of diffusers' AutoencoderKL, whose own defaults are a toy network."""
    values = asdict(config)
    attention_levels = values.pop("attention_levels")
    kinds = [
        ATTENTION_BLOCKS if level in attention_levels else PLAIN_BLOCKS
        for level in range(len(config.block_out_channels))
    ]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        **values,
    }


def from_diffusers_config(values: dict[str, Any], path: Path) -> AutoencoderConfig:
    """The configuration in a `config.json`; `path` is for the error that names what this library cannot build."""
    kind = values.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise WeightsError(f"{path}: _class_name is {kind!r}, expected 'AutoencoderKL'; this is another kind of model")
    if values.get("act_fn", "silu") != "silu":
        raise WeightsError(f"{path}: act_fn is {values['act_fn']!r}, expected 'silu'")
    known = {field.name for field in fields(AutoencoderConfig)}
    given = THEIR_DEFAULTS | {name: value for name, value in values.items() if name in known}
    blocks = values.get("down_block_types", [])
    supported = (PLAIN_BLOCKS[0], ATTENTION_BLOCKS[0])
    if not isinstance(blocks, list) or any(kind not in supported for kind in blocks):
        raise WeightsError(f"{path}: down_block_types {blocks!r:.80} are not supported, expected {list(supported)}")
    try:
        return AutoencoderConfig(
            **given, attention_levels=[i for i, kind in enumerate(blocks) if kind == ATTENTION_BLOCKS[0]]
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error


def read_config(path: Path) -> AutoencoderConfig:
    return from_diffusers_config(read_json(path), path)
