"""The architecture of an autoencoder, read from its tensors where no configuration is there."""

import re
from pathlib import Path

from vae.checkpoints.families import FAMILIES, families_of
from vae.checkpoints.ldm import SD_CHANNELS
from vae.checkpoints.safe import State, WeightsError
from vae.models.autoencoder import AutoencoderConfig
from vae.models.autoencoder_config import Assumed

QUANT_CONVS = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")


def infer_config(path: Path, state: State) -> AutoencoderConfig:
    """The architecture that tensors under LDM's or diffusers' names have. Groups of 32 are assumed: no tensor tells."""
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
        names = sorted(state)
        raise WeightsError(
            f"{path}: not a complete autoencoder, {error} is missing beside its {len(names)} tensors "
            f"(first {names[:3]}); is it one half of one?"
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{path}: its widths do not tell the number of groups ({error}); load it with its config.json"
        ) from error
    if config.latent_channels == SD_CHANNELS and not (config.use_quant_conv and config.use_post_quant_conv):
        missing = [name for name in QUANT_CONVS if name not in state]
        raise WeightsError(
            f"{path}: {SD_CHANNELS} latent channels and {len(missing)} keys missing (first {missing[:3]}): a network "
            f"that has none, or a file that lost them; say which by the architecture (--config, or config= in Python)"
        )
    return _with_family_constants(config)


def _with_family_constants(config: AutoencoderConfig) -> AutoencoderConfig:
    """By its latent channels; SD and SDXL, or SD3 and FLUX, cannot be told apart by a standalone file: assumed."""
    fitting = families_of(config)
    if len(fitting) == 1:
        return config.with_scale(*FAMILIES[fitting[0]])
    scaling, shift = FAMILIES["sd" if config.use_quant_conv else "flux"]
    return config.with_scale(Assumed(scaling), shift)


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _first(state: State, pattern: str) -> str:
    for name in state:
        if re.fullmatch(pattern, name):
            return name
    raise KeyError(pattern.replace("\\", ""))
