"""The folder layout of diffusers: `config.json` beside the weights. Names of tensors there are the same as ours."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_tiny import LATENT_MAGNITUDE
from vae.weights.loaded import read_json
from vae.weights.taesd import AS_TINY, USUAL_BLOCKS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WRITTEN_FOR = "0.32.0"  # the oldest diffusers whose AutoencoderKL has every field written here
PLAIN_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
ATTENTION_BLOCKS = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
THEIR_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}  # where ours are others
KINDS = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}  # architecture: diffusers' class
NOT_THEIRS = ("architecture", "mid_block_pool")
TINY_SAME = ("in_channels", "out_channels", "latent_channels", "scaling_factor", "force_upcast")
TINY_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
TINY_BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")
TINY_CONSTANTS = {  # fields of diffusers' AutoencoderTiny that have only one value here
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": LATENT_MAGNITUDE,
    "latent_shift": 0.5,
}


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the `config.json` of an autoencoder, with every field of diffusers' class.

    All fields are written because the defaults of diffusers' AutoencoderKL describe a toy network. Raises WeightsError
    where a tiny autoencoder has a setting that diffusers' class lacks.
    """
    if config.architecture == "tiny":
        return _to_tiny(config)

    values = {name: value for name, value in asdict(config).items() if name not in NOT_THEIRS}
    attention_levels = values.pop("attention_levels")
    kinds = [
        ATTENTION_BLOCKS if level in attention_levels else PLAIN_BLOCKS
        for level in range(len(config.block_out_channels))
    ]

    return {
        "_class_name": KINDS["kl"],
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        **values,
    }


def from_diffusers_config(values: dict[str, Any], path: Path) -> AutoencoderConfig:
    """Return the configuration that the `values` of a `config.json` describe.

    `path` is for the error. Raises WeightsError where they describe another kind of model, or a setting that this
    library cannot build.
    """
    kind = values.get("_class_name", KINDS["kl"])
    if kind == KINDS["tiny"]:
        return _from_tiny(values, path)
    if kind != KINDS["kl"]:
        expected = " or ".join(map(repr, KINDS.values()))
        raise WeightsError(f"{path}: _class_name is {kind!r}, expected {expected}; this is another kind of model")

    if values.get("act_fn", "silu") != "silu":
        raise WeightsError(f"{path}: act_fn is {values['act_fn']!r}, expected 'silu'")

    known = {field.name for field in fields(AutoencoderConfig)} - {*NOT_THEIRS}
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
    """Read a `config.json`. Raises WeightsError as `from_diffusers_config` does, or where the file is not readable."""
    return from_diffusers_config(read_json(path), path)


def _to_tiny(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the `config.json` of diffusers' AutoencoderTiny. Raises WeightsError where it lacks a setting."""
    for name in ("mid_block_pool", "latents_mean", "latents_std"):
        if getattr(config, name):
            raise WeightsError(f"diffusers' AutoencoderTiny has no {name}; write one file, NAME.safetensors, instead")

    return {
        "_class_name": KINDS["tiny"],
        "_diffusers_version": WRITTEN_FOR,
        **TINY_CONSTANTS,
        **{name: getattr(config, name) for name in TINY_SAME},
        "shift_factor": config.shift_factor or 0.0,
        **_tiny_shape(config),
    }


def _tiny_shape(config: AutoencoderConfig) -> dict[str, list[int]]:
    """Return the fields of diffusers' AutoencoderTiny that state widths and numbers of blocks."""
    widths = config.block_out_channels
    blocks = [1] + [config.layers_per_block] * (len(widths) - 1)
    encoder, decoder = TINY_BLOCKS
    return {**{name: widths for name in TINY_WIDTHS}, encoder: blocks, decoder: blocks[::-1]}


def _from_tiny(values: dict[str, Any], path: Path) -> AutoencoderConfig:
    """Return the configuration in a `config.json` of AutoencoderTiny. Raises WeightsError where it cannot be built."""
    try:
        blocks = values.get(TINY_BLOCKS[0], [1] + [USUAL_BLOCKS] * 3)
        shape = {
            "block_out_channels": values.get(TINY_WIDTHS[0], [64] * 4),
            "layers_per_block": blocks[-1] if len(blocks) > 1 else USUAL_BLOCKS,
            "shift_factor": values.get("shift_factor") or None,
        }
        config = AutoencoderConfig(**(AS_TINY | {name: values[name] for name in TINY_SAME if name in values} | shape))
    except (TypeError, ValueError, LookupError) as error:
        raise WeightsError(f"{path}: {error}") from error

    # Fields that have one value here, and both halves' shapes, must be what our network computes.
    for name, expected in (TINY_CONSTANTS | _tiny_shape(config)).items():
        given = values.get(name, expected)
        if given != expected:
            raise WeightsError(f"{path}: {name} is {given!r:.80}, which is not supported, expected {expected!r}")
    return config
