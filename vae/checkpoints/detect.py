"""What a bag of named tensors is: which are the autoencoder, in which layout, of which architecture and family."""

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from vae.checkpoints.ldm import from_ldm
from vae.checkpoints.safe import State, WeightsError
from vae.models.autoencoder import AutoencoderConfig

PREFIXES = ("", "first_stage_model.", "vae.")  # standalone files; SD checkpoints; FLUX and most later families
SD_CHANNELS = 4  # of SD and SDXL, whose networks always have quant convolutions
ANCHOR = "decoder.conv_in.weight"
TRAINING_ONLY = ("loss.", "model_ema.", "colorize")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
FAMILIES: dict[str, tuple[float, float | None]] = {  # scaling and shift factor of the diffusion models
    "sd": (0.18215, None),
    "sdxl": (0.13025, None),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
}
SIGNS = {  # a tensor whose name contains this says which diffusion model a full checkpoint holds
    "joint_blocks.": "sd3",
    "double_blocks.": "flux",
    "conditioner.embedders.1.": "sdxl",
    "cond_stage_model.": "sd",
}


@dataclass(frozen=True)
class Found:
    """An autoencoder's tensors under our names, and what was learned on the way."""

    state: State
    config: AutoencoderConfig
    layout: str  # "diffusers" or "ldm"
    weights: str  # "live" or "EMA"
    family: str | None  # None where the file does not tell


def find_autoencoder(path: Path, state: State, config: AutoencoderConfig | None, *, ema: bool = False) -> Found:
    """The autoencoder in `state`; its architecture is read from the tensors where `config` is None.

    `ema` takes the averaged weights of a training checkpoint, which must then be complete.
    """
    family = next((name for sign, name in SIGNS.items() if any(sign in key for key in state)), None)
    ours, shadow = _autoencoder_tensors(path, state)
    layout = "diffusers" if any(".mid_block." in name for name in ours) else "ldm"
    if ema:
        ours = _averaged(path, ours, shadow)
    if config is None:
        config = infer_config(path, ours)
        if family is not None:
            scaling, shift = FAMILIES[family]
            config = replace(config, scaling_factor=scaling, shift_factor=shift)
    ours = from_ldm(ours, config) if layout == "ldm" else _modern_attention(ours)
    return Found(ours, config, layout, "EMA" if ema else "live", family)


def prefix_of(names: Container[str]) -> str | None:
    """What stands before the autoencoder's names, or None where there is no autoencoder."""
    return next((prefix for prefix in reversed(PREFIXES) if prefix + ANCHOR in names), None)


def infer_config(path: Path, state: State) -> AutoencoderConfig:
    """The architecture that tensors under LDM's or diffusers' names have. Groups of 32 are taken for granted."""
    levels = _count(state, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    layers = _count(state, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.")
    try:
        widths = [
            state[_first(state, rf"encoder\.down(?:_blocks)?\.{i}\.(?:block|resnets)\.0\.conv1\.weight")].shape[0]
            for i in range(levels)
        ]
        config = AutoencoderConfig(
            in_channels=state["encoder.conv_in.weight"].shape[1],
            out_channels=state["decoder.conv_out.weight"].shape[0],
            latent_channels=state[ANCHOR].shape[1],
            block_out_channels=widths,
            layers_per_block=layers,
            use_quant_conv="quant_conv.weight" in state,
            use_post_quant_conv="post_quant_conv.weight" in state,
            mid_block_add_attention=any(re.match(r"decoder\.mid(_block)?\.att", name) for name in state),
            attention_levels=[
                i for i in range(levels) if any(re.match(rf"encoder\.down(_blocks)?\.{i}\.att", n) for n in state)
            ],
        )
    except (KeyError, StopIteration) as error:
        raise WeightsError(f"{path}: not a complete autoencoder, {error} is missing; is it one half of one?") from error
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


def _autoencoder_tensors(path: Path, state: State) -> tuple[State, State]:
    """(its tensors without prefix, averaged weights under LDM's dotless names)."""
    prefix = prefix_of(state)
    if prefix is None:
        raise WeightsError(f"{path}: no {ANCHOR} in it; {_guess(state)}")
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "bn.running_mean" in inside:
        raise WeightsError(f"{path}: a FLUX.2 autoencoder (it has bn.running_mean), which is another architecture")
    shadow = {
        name.removeprefix("model_ema."): tensor for name, tensor in inside.items() if name.startswith("model_ema.")
    }
    return {name: tensor for name, tensor in inside.items() if not name.startswith(TRAINING_ONLY)}, shadow


def _guess(state: State) -> str:
    if any(name.startswith("model.diffusion_model.") for name in state):
        return "this looks like a diffusion model whose checkpoint has no VAE"
    if any(name.startswith(("encoder.", "quant_conv.")) for name in state):
        return "this looks like an encoder alone; the whole autoencoder is needed"
    return f"its {len(state)} tensors are not a KL autoencoder's (first {sorted(state)[:3]})"


def _averaged(path: Path, live: State, shadow: State) -> State:
    missing = [name for name in live if name.replace(".", "") not in shadow]
    if missing:
        raise WeightsError(f"{path}: {len(missing)} averaged weights missing (first {missing[:3]}); load the live ones")
    return {name: shadow[name.replace(".", "")] for name in live}


def _modern_attention(state: State) -> State:
    def rename(name: str) -> str:
        return re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name
        )

    renamed = {rename(name): tensor for name, tensor in state.items()}
    return {
        name: tensor.flatten(1) if re.search(r"attentions\.\d+\.to_.*weight$", name) else tensor
        for name, tensor in renamed.items()
    }


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _first(state: State, pattern: str) -> str:
    return next(name for name in state if re.fullmatch(pattern, name))
