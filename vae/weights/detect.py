"""The architecture of an autoencoder, read from its tensors where no configuration is there.

Which of a file's named tensors are the autoencoder, in which layout and of which family."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vae.config.model import Assumed, AutoencoderConfig
from vae.files import State, WeightsError
from vae.weights.families import FAMILIES, families_of, family_beside, is_published_network, looks_like
from vae.weights.ldm import SD_CHANNELS, as_linear, from_ldm, is_projection
from vae.weights.loaded import LoadedWeights, WeightsFile
from vae.weights.taesd import find_tiny, tiny_names

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


PREFIXES = ("vae.", "first_stage_model.", "")  # FLUX and most later families; SD checkpoints; standalone files
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ANCHOR = "decoder.conv_in.weight"
SHADOW = "model_ema."  # LDM's averaged weights, whose names have lost their dots
SHADOW_COUNTERS = ("decay", "num_updates")
PLAYGROUND, PLAYGROUND_SCALE = ("edm_mean", "edm_std"), 0.5  # Playground v2.5's latents, per channel
TRAINING_ONLY = ("loss.", SHADOW, "colorize")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
LDM_WORDS = (  # of its names; longer ones first, where one begins another
    r"post_quant_conv|quant_conv|encoder|decoder|downsample|upsample|down|up|mid|block_\d|attn_\d|block|attn|"
    r"nin_shortcut|proj_out|norm_out|norm\d?|conv_in|conv_out|conv\d?|weight|bias|[qkv]|\d+"
)


def find_autoencoder(source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool = False) -> LoadedWeights:
    """The autoencoder in `source`; its architecture is read from the tensors where nothing states it.

    `ema` takes the averaged weights of a training checkpoint, which must then be complete. So does a checkpoint that
    has no others.
    """
    path, is_told, config = source.file, config is not None, config or source.config
    tiny = find_tiny(source, config)
    if tiny is not None:
        if ema:
            raise WeightsError(f"{path}: a tiny autoencoder without averaged weights beside; load the live ones")
        return tiny
    if config is not None and config.architecture == "tiny":
        raise WeightsError(f"{path}: the configuration is a tiny autoencoder's, its tensors are not; leave that out")
    stated = config is not None
    live, shadow = _autoencoder_tensors(path, source.state)
    ema = ema or ANCHOR not in live
    ours = _averaged(path, live, shadow) if ema else live
    others = len(source.state) - len(ours)
    layout = "diffusers" if any(".mid_block." in name for name in ours) else "ldm"
    config = config or infer_config(path, ours)
    family = family_beside(source.state, config)
    if not stated:
        if family is not None:
            scaling, shift = FAMILIES[family]
            config = replace(config, scaling_factor=scaling, shift_factor=shift)
        if set(PLAYGROUND) <= source.state.keys():
            mean, std = (source.state[name].flatten().tolist() for name in PLAYGROUND)
            config = replace(config, scaling_factor=PLAYGROUND_SCALE, latents_mean=mean, latents_std=std)
    ours = from_ldm(ours, config) if layout == "ldm" else _modern_attention(ours)
    found = LoadedWeights(path, ours, config, layout, "EMA" if ema else "live", family, stated, others, source.notes)
    if stated and not is_told:
        return found  # with what the file itself calls assumed
    return found.with_groups_assumed(not stated and not (family is not None and is_published_network(config)))


def autoencoder_names(names: Iterable[str]) -> set[str]:
    """Those of the tensors in a file that belong to its autoencoder, averaged weights too."""
    names = list(names)
    prefix = prefix_of(names) or ""
    starts = tuple(prefix + part for part in (*PARTS, SHADOW))
    return {name for name in names if name.startswith(starts) or name in PLAYGROUND} | tiny_names(names)


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before the autoencoder's names, or None where there is none, or several of unknown standing."""
    found = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    known = [prefix for prefix in PREFIXES if prefix in found]
    return known[0] if known else found[0] if len(found) == 1 else None


def _autoencoder_tensors(path: Path, state: State) -> tuple[State, State]:
    """(its tensors without prefix, averaged weights under their names without dots); one of them may be empty."""
    prefix = prefix_of(state)
    if prefix is None and f"{SHADOW}{ANCHOR.replace('.', '')}" not in state:
        raise WeightsError(f"{path}: no {ANCHOR} in it; {looks_like(state)}")
    inside = {name.removeprefix(prefix or ""): t for name, t in state.items() if name.startswith(prefix or "")}
    if "bn.running_mean" in inside:
        raise WeightsError(f"{path}: a FLUX.2 autoencoder (it has bn.running_mean), which is another architecture")
    shadow = {name.removeprefix(SHADOW): tensor for name, tensor in inside.items() if name.startswith(SHADOW)}
    for counter in SHADOW_COUNTERS:
        shadow.pop(counter, None)
    return {name: tensor for name, tensor in inside.items() if not name.startswith(TRAINING_ONLY)}, shadow


def _averaged(path: Path, live: State, shadow: State) -> State:
    """The averaged weights under LDM's names: those of the live ones, or spelt out where there are none."""
    if ANCHOR in live:
        names = {name.replace(".", ""): name for name in live if name.startswith(PARTS)}
    else:
        names = {name: _with_dots(path, name) for name in shadow}
    missing = [name for dotless, name in names.items() if dotless not in shadow]
    if missing:
        raise WeightsError(f"{path}: {len(missing)} averaged weights missing (first {missing[:3]}); load the live ones")
    return {name: shadow[dotless] for dotless, name in names.items()}


def _with_dots(path: Path, name: str) -> str:
    words = re.findall(LDM_WORDS, name)
    if "".join(words) != name:
        raise WeightsError(f"{path}: {SHADOW}{name} is not the average of a KL autoencoder's weight")
    return ".".join(words)


def _modern_attention(state: State) -> State:
    def rename(name: str) -> str:
        return re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name
        )

    renamed = {rename(name): tensor for name, tensor in state.items()}
    return {name: as_linear(tensor) if is_projection(name) else tensor for name, tensor in renamed.items()}
