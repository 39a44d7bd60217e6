"""The architecture of an autoencoder, read from its tensors where no configuration is there."""

import re
from dataclasses import replace
from pathlib import Path

from vae.checkpoints.families import FAMILIES
from vae.checkpoints.ldm import SD_CHANNELS
from vae.checkpoints.safe import State, WeightsError
from vae.models.autoencoder import AutoencoderConfig


def infer_config(path: Path, state: State) -> AutoencoderConfig:
    """The architecture that tensors under LDM's or diffusers' names have. Groups of 32 are taken for granted."""
    try:
        levels = _count(state, r"encoder\.down(?:_blocks)?\.(\d+)\.")
        layers = _count(state, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.")
        widths = [
            state[_first(state, rf"encoder\.down(?:_blocks)?\.{i}\.(?:block|resnets)\.0\.conv1\.weight")].shape[0]
            for i in range(levels)
        ]
        config = AutoencoderConfig(
            in_channels=state["encoder.conv_in.weight"].shape[1],
            out_channels=state["decoder.conv_out.weight"].shape[0],
            latent_channels=state["decoder.conv_in.weight"].shape[1],
            block_out_channels=widths,
            layers_per_block=layers,
            use_quant_conv="quant_conv.weight" in state,
            use_post_quant_conv="post_quant_conv.weight" in state,
            mid_block_add_attention=any(re.match(r"decoder\.mid(_block)?\.att", name) for name in state),
            attention_levels=[
                i for i in range(levels) if any(re.match(rf"encoder\.down(_blocks)?\.{i}\.att", n) for n in state)
            ],
        )
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{path}: not a complete autoencoder ({error} missing); is it one half of one?") from error
    except ValueError as error:
        raise WeightsError(
            f"{path}: its widths do not tell the number of groups ({error}); load it with its config.json"
        ) from error
    if config.latent_channels == SD_CHANNELS and not (config.use_quant_conv and config.use_post_quant_conv):
        raise WeightsError(
            f"{path}: {SD_CHANNELS} latent channels without quant_conv and post_quant_conv: a network that has none, "
            f"or a file that lost them; say which by the architecture (config=, or a diffusers folder's config.json)"
        )
    return _with_family_constants(config)


def _with_family_constants(config: AutoencoderConfig) -> AutoencoderConfig:
    """By its latent channels; SD and SDXL, or SD3 and FLUX, cannot be told apart by a standalone file."""
    scaling, shift = FAMILIES["sd" if config.use_quant_conv else "flux"]
    return replace(config, scaling_factor=scaling, shift_factor=shift)


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _first(state: State, pattern: str) -> str:
    for name in state:
        if re.fullmatch(pattern, name):
            return name
    raise KeyError(pattern.replace("\\", ""))
