"""Find the autoencoder among the named tensors of a file: its architecture, its layout and its family.

`infer_config` reads the architecture from names and shapes where no configuration comes with the tensors.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from vae.config.model import Assumed, AutoencoderConfig
from vae.files import State, WeightsError
from vae.weights.families import FAMILIES, families_of, family_beside, is_published_network, looks_like
from vae.weights.ldm import SD_CHANNELS, as_linear, from_ldm, is_projection
from vae.weights.loaded import LoadedWeights, WeightsFile
from vae.weights.taesd import find_tiny, tiny_names

QUANT_CONVS = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")


def infer_config(path: Path, state: State) -> AutoencoderConfig:
    """Read the architecture from tensors under LDM's or diffusers' names.

    Groups of 32 are assumed, because no tensor shows their number. `path` is for the error. Raises WeightsError where
    tensors are missing, or where the widths cannot have such groups.
    """
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

    # SD's own networks have these convolutions: whether a file lost them or never had them cannot be told.
    if config.latent_channels == SD_CHANNELS and not (config.use_quant_conv and config.use_post_quant_conv):
        missing = [name for name in QUANT_CONVS if name not in state]
        raise WeightsError(
            f"{path}: {SD_CHANNELS} latent channels and {len(missing)} keys missing (first {missing[:3]}): a network "
            f"that has none, or a file that lost them; say which by the architecture (--config, or config= in Python)"
        )

    return _with_family_constants(config)


def _with_family_constants(config: AutoencoderConfig) -> AutoencoderConfig:
    """Return `config` with the scale of the family that its shape fits.

    Where several families fit, the scale is marked as assumed: a standalone file cannot show whether it belongs to SD
    or SDXL, or to SD3 or FLUX.
    """
    fitting = families_of(config)
    if len(fitting) == 1:
        return config.with_scale(*FAMILIES[fitting[0]])
    scaling, shift = FAMILIES["sd" if config.use_quant_conv else "flux"]
    return config.with_scale(Assumed(scaling), shift)


def _count(state: State, pattern: str) -> int:
    """Count the levels or layers whose number is the group of `pattern`."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _first(state: State, pattern: str) -> str:
    """Return the first name that `pattern` matches whole. Raises KeyError where there is none."""
    for name in state:
        if re.fullmatch(pattern, name):
            return name
    raise KeyError(pattern.replace("\\", ""))


PREFIXES = ("vae.", "first_stage_model.", "")  # FLUX and most later families; SD checkpoints; standalone files
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ANCHOR = "decoder.conv_in.weight"
SHADOW = "model_ema."  # LDM's EMA weights, whose names have lost their dots
SHADOW_COUNTERS = ("decay", "num_updates")
PLAYGROUND, PLAYGROUND_SCALE = ("edm_mean", "edm_std"), 0.5  # Playground v2.5 states mean and std per channel
TRAINING_ONLY = ("loss.", SHADOW, "colorize")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
LDM_WORDS = (  # in LDM's names; where one word begins another, the longer one comes first
    r"post_quant_conv|quant_conv|encoder|decoder|downsample|upsample|down|up|mid|block_\d|attn_\d|block|attn|"
    r"nin_shortcut|proj_out|norm_out|norm\d?|conv_in|conv_out|conv\d?|weight|bias|[qkv]|\d+"
)


def find_autoencoder(source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool = False) -> LoadedWeights:
    """Find the autoencoder in `source`, and return its tensors under our names.

    `config` is a configuration that the user states; it replaces the one in `source`. Where there is neither, the
    architecture is read from the tensors. `ema` takes the EMA weights of a training checkpoint, which must be complete.
    They are also taken where the file has no other weights. Raises WeightsError where no autoencoder is found.
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

    # A stated configuration has its scale. Otherwise the diffusion model in the same file shows which one it is.
    if not stated:
        if family is not None:
            config = config.with_scale(*FAMILIES[family])
        if set(PLAYGROUND) <= source.state.keys():
            mean, std = (source.state[name].flatten().tolist() for name in PLAYGROUND)
            config = config.with_scale(PLAYGROUND_SCALE, latents_mean=mean, latents_std=std)

    ours = from_ldm(ours, config) if layout == "ldm" else _modern_attention(ours)
    found = LoadedWeights(path, ours, config, layout, "EMA" if ema else "live", family, stated, others, source.notes)

    if stated and not is_told:
        return found  # the file's own notes say which values are assumed
    return found.with_groups_assumed(not stated and not (family is not None and is_published_network(config)))


def autoencoder_names(names: Iterable[str]) -> set[str]:
    """Return the names of a file's tensors that belong to its autoencoder, EMA weights included."""
    names = list(names)
    prefix = prefix_of(names) or ""
    starts = tuple(prefix + part for part in (*PARTS, SHADOW))
    return {name for name in names if name.startswith(starts) or name in PLAYGROUND} | tiny_names(names)


def prefix_of(names: Iterable[str]) -> str | None:
    """Return the prefix of the autoencoder's names; "" for a standalone file.

    Return None where there is no autoencoder, or where several have prefixes that are not known.
    """
    found = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    known = [prefix for prefix in PREFIXES if prefix in found]
    return known[0] if known else found[0] if len(found) == 1 else None


def _autoencoder_tensors(path: Path, state: State) -> tuple[State, State]:
    """Return (live tensors without prefix, EMA weights under names without dots). One of the two may be empty.

    Raises WeightsError where there is no autoencoder, or where it is FLUX.2's.
    """
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
    """Return the EMA weights under LDM's names, which the names of the live weights show.

    Without live weights the names are put together from LDM's words. Raises WeightsError where EMA weights are missing.
    """
    if ANCHOR in live:
        names = {name.replace(".", ""): name for name in live if name.startswith(PARTS)}
    else:
        names = {name: _with_dots(path, name) for name in shadow}

    missing = [name for dotless, name in names.items() if dotless not in shadow]
    if missing:
        raise WeightsError(f"{path}: {len(missing)} averaged weights missing (first {missing[:3]}); load the live ones")
    return {name: shadow[dotless] for dotless, name in names.items()}


def _with_dots(path: Path, name: str) -> str:
    """Return LDM's name for one that has lost its dots. Raises WeightsError where it is not made of LDM's words."""
    words = re.findall(LDM_WORDS, name)
    if "".join(words) != name:
        raise WeightsError(f"{path}: {SHADOW}{name} is not the average of a KL autoencoder's weight")
    return ".".join(words)


def _modern_attention(state: State) -> State:
    """Rename the attention layers of diffusers before 0.17, and make their 1x1 convolutions linear."""

    def rename(name: str) -> str:
        return re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name
        )

    renamed = {rename(name): tensor for name, tensor in state.items()}
    return {name: as_linear(tensor) if is_projection(name) else tensor for name, tensor in renamed.items()}
