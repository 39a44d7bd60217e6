"""AutoencoderKL's published files: LDM's single file, which web UIs and ComfyUI read, and the folder of diffusers.

Names of tensors in diffusers' folder are ours. LDM's differ, in names and in the shape of attention. The published
converters assume four levels; the table here follows from the configuration and holds for any number. Where no
configuration comes with the tensors, it is read from their names and shapes.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae.config.model import Assumed, AutoencoderConfig
from vae.files import State, WeightsError
from vae.weights.families import (
    FAMILIES,
    LATENT_CHANNELS,
    SD_WIDTHS,
    X4_WIDTHS,
    families_of,
    family_beside,
    has_scale_of,
    is_published_network,
)
from vae.weights.formats import ANCHOR, PARTS, WRITTEN_FOR, Format
from vae.weights.loaded import LoadedWeights, WeightsFile

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
SD_CHANNELS = 4  # latent channels of SD and SDXL, whose programs require quant convolutions; SD3 and FLUX have none
QUANT_CONVS = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
PREFIXES = ("vae.", "first_stage_model.", "")  # FLUX and most later families; SD checkpoints; standalone files
SHADOW = "model_ema."  # LDM's EMA weights, whose names have lost their dots
SHADOW_COUNTERS = ("decay", "num_updates")
PLAYGROUND = ("edm_mean", "edm_std")  # Playground v2.5 states mean and std per channel
PLAYGROUND_SCALE = 0.5
TRAINING_ONLY = ("loss.", SHADOW, "colorize")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
LDM_WORDS = (  # in LDM's names; where one word begins another, the longer one comes first
    r"post_quant_conv|quant_conv|encoder|decoder|downsample|upsample|down|up|mid|block_\d|attn_\d|block|attn|"
    r"nin_shortcut|proj_out|norm_out|norm\d?|conv_in|conv_out|conv\d?|weight|bias|[qkv]|\d+"
)
PLAIN_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
ATTENTION_BLOCKS = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
THEIR_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}  # where ours are others
NOT_THEIRS = ("architecture", "mid_block_pool")
ANY_NETWORK = ["diffusers", "kohya sd-scripts (folder)"]
WEB_UIS = ["Forge", "SD.Next", "kohya sd-scripts"]


def ldm_names(config: AutoencoderConfig) -> dict[str, str]:
    """Return {our name: LDM's name} for every tensor that an autoencoder of this configuration can have."""
    last = len(config.block_out_channels) - 1
    layers: dict[str, str] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    for half in ("encoder", "decoder"):
        layers |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in ENDS.items()}
        layers |= _below(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", ATTENTION)
        for j in range(2):
            layers |= _below(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", RESNET)

    for i in range(last + 1):
        down = f"encoder.down.{i}"
        up = f"decoder.up.{last - i}"  # LDM counts `up` from the image side
        layers |= _level(f"encoder.down_blocks.{i}", down, config.layers_per_block)
        layers |= _level(f"decoder.up_blocks.{i}", up, config.layers_per_block + 1)
        layers[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        layers[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"

    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in layers.items() for part in ("weight", "bias")}


def to_ldm(state: State, config: AutoencoderConfig) -> State:
    """Rename our tensors to LDM's names. Attention projections [C, C] become 1x1 convolutions [C, C, 1, 1].

    A network with SD's latent channels but without quant convolutions gets identities in their place, because the
    programs that load SD require them.
    """
    names = ldm_names(config)
    renamed = {names[name]: _as_convolution(name, tensor) for name, tensor in state.items()}
    dtype = next(iter(state.values())).dtype
    return renamed | {name: tensor.to(dtype) for name, tensor in _identities(config).items()}


def from_ldm(state: State, config: AutoencoderConfig) -> State:
    """Rename LDM's tensors to ours: the inverse of `to_ldm`, which also removes the identities that it added.

    A name that LDM does not have is kept, so that the strict check that follows reports it.
    """
    names = {theirs: ours for ours, theirs in ldm_names(config).items()}
    filling = _identities(config)
    state = {name: tensor for name, tensor in state.items() if name not in filling or not _same(tensor, filling[name])}
    renamed = {names.get(name, name): tensor for name, tensor in state.items()}
    return {name: as_linear(tensor) if is_projection(name) else tensor for name, tensor in renamed.items()}


def _identities(config: AutoencoderConfig) -> State:
    """Return 1x1 convolutions that do nothing, in place of the quant convolutions that an SD network here lacks."""
    missing = {"quant_conv": not config.use_quant_conv, "post_quant_conv": not config.use_post_quant_conv}
    identities: State = {}
    for name, width in (("quant_conv", 2 * SD_CHANNELS), ("post_quant_conv", SD_CHANNELS)):
        if config.latent_channels == SD_CHANNELS and missing[name]:
            identities[f"{name}.weight"] = torch.eye(width)[:, :, None, None]
            identities[f"{name}.bias"] = torch.zeros(width)
    return identities


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and, in float32, the same values."""
    return tensor.shape == other.shape and torch.equal(tensor.float(), other)


def _level(ours: str, theirs: str, resnets: int) -> dict[str, str]:
    """Return {our name: LDM's name} of the layers of one level with this many residual blocks."""
    names: dict[str, str] = {}
    for j in range(resnets):
        names |= _below(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", RESNET)
        names |= _below(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}", ATTENTION)
    return names


def _below(ours: str, theirs: str, inner: dict[str, str]) -> dict[str, str]:
    """Return {our name: LDM's name} of the `inner` layers of one block."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}


def as_linear(weight: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution [C, C, 1, 1] into that of a linear layer [C, C].

    Any other tensor is returned as it is, and the check of shapes reports it.
    """
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight


def is_projection(name: str) -> bool:
    """Return whether `name`, one of ours, is the weight of an attention projection."""
    return ".attentions." in name and ".to_" in name and name.endswith(".weight")


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Turn the weight of an attention projection into that of a 1x1 convolution; return others as they are."""
    return tensor[:, :, None, None] if is_projection(name) else tensor


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


def prefix_of(names: Iterable[str]) -> str | None:
    """Return the prefix of the autoencoder's names; "" for a standalone file.

    Return None where there is no autoencoder, or where several have prefixes that are not known.
    """
    found = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    known = [prefix for prefix in PREFIXES if prefix in found]
    if known:
        return known[0]
    return found[0] if len(found) == 1 else None


def _autoencoder_tensors(path: Path, state: State) -> tuple[State, State]:
    """Return (live tensors without prefix, EMA weights under names without dots). One of the two may be empty.

    Both are empty where there is no autoencoder. Raises WeightsError where it is FLUX.2's.
    """
    prefix = prefix_of(state)
    if prefix is None and f"{SHADOW}{ANCHOR.replace('.', '')}" not in state:
        return {}, {}

    inside = {name.removeprefix(prefix or ""): t for name, t in state.items() if name.startswith(prefix or "")}
    if "bn.running_mean" in inside:
        raise WeightsError(f"{path}: a FLUX.2 autoencoder (it has bn.running_mean), which is another architecture")

    shadow = {name.removeprefix(SHADOW): tensor for name, tensor in inside.items() if name.startswith(SHADOW)}
    for counter in SHADOW_COUNTERS:
        shadow.pop(counter, None)
    return {name: tensor for name, tensor in inside.items() if not name.startswith(TRAINING_ONLY)}, shadow


def _ema_weights(path: Path, live: State, shadow: State) -> State:
    """Return the EMA weights under LDM's names, which the names of the live weights show.

    Without live weights the names are put together from LDM's words. Raises WeightsError where EMA weights are missing.
    """
    if ANCHOR in live:
        names = {name.replace(".", ""): name for name in live if name.startswith(PARTS)}
    else:
        names = {name: _with_dots(path, name) for name in shadow}

    missing = [name for dotless, name in names.items() if dotless not in shadow]
    if missing:
        raise WeightsError(f"{path}: {len(missing)} EMA weights missing (first {missing[:3]}); load the live ones")
    return {name: shadow[dotless] for dotless, name in names.items()}


def _with_dots(path: Path, name: str) -> str:
    """Return LDM's name for one that has lost its dots. Raises WeightsError where it is not made of LDM's words."""
    words = re.findall(LDM_WORDS, name)
    if "".join(words) != name:
        raise WeightsError(f"{path}: {SHADOW}{name} is not the EMA of a KL autoencoder's weight")
    return ".".join(words)


def _modern_attention(state: State) -> State:
    """Rename the attention layers of diffusers before 0.17, and make their 1x1 convolutions linear."""

    def rename(name: str) -> str:
        return re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name
        )

    renamed = {rename(name): tensor for name, tensor in state.items()}
    return {name: as_linear(tensor) if is_projection(name) else tensor for name, tensor in renamed.items()}


class LDMFormat(Format):
    """The published files of AutoencoderKL."""

    words = "LDM names, as in web UIs"

    def names(self, names: Iterable[str]) -> set[str]:
        """Return the names of an autoencoder under any of the known prefixes, and of its EMA weights."""
        names = list(names)
        prefix = prefix_of(names) or ""
        starts = tuple(prefix + part for part in (*PARTS, SHADOW))
        return {name for name in names if name.startswith(starts) or name in PLAYGROUND}

    def find(self, source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool) -> LoadedWeights | None:
        """Find an autoencoder under LDM's or diffusers' names, also in a full checkpoint."""
        path = source.file
        live, shadow = _autoencoder_tensors(path, source.state)
        if not live and not shadow:
            return None

        is_told = config is not None
        config = config or source.config
        stated = config is not None
        if config is not None:
            self.check_kind(path, config)

        ema = ema or ANCHOR not in live
        tensors = _ema_weights(path, live, shadow) if ema else live
        config = config or infer_config(path, tensors)
        family = family_beside(source.state, config)
        if not stated:
            config = _with_scale_beside(source.state, config, family)

        layout = "diffusers" if any(".mid_block." in name for name in tensors) else "ldm"
        ours = from_ldm(tensors, config) if layout == "ldm" else _modern_attention(tensors)
        weights = "EMA" if ema else "live"
        others = len(source.state) - len(tensors)
        found = LoadedWeights(path, ours, config, layout, weights, family, stated, others, source.notes)

        if stated and not is_told:
            return found  # the file's own notes say which values are assumed
        return found.with_groups_assumed(not stated and not (family is not None and is_published_network(config)))

    def to_files(self, state: State, config: AutoencoderConfig, path: Path, family: str | None) -> dict[Path, State]:
        """Return the one file in LDM's names."""
        return {path: to_ldm(state, config)}

    def to_diffusers(self, config: AutoencoderConfig) -> dict[str, Any]:
        """Return every field of diffusers' AutoencoderKL, because the defaults of that class describe a toy network."""
        values = {name: value for name, value in asdict(config).items() if name not in NOT_THEIRS}
        attention_levels = values.pop("attention_levels")
        kinds = [
            ATTENTION_BLOCKS if level in attention_levels else PLAIN_BLOCKS
            for level in range(len(config.block_out_channels))
        ]

        return {
            "_class_name": self.kind.network,
            "_diffusers_version": WRITTEN_FOR,
            "act_fn": "silu",
            "down_block_types": [down for down, _ in kinds],
            "up_block_types": [up for _, up in reversed(kinds)],
            **values,
        }

    def from_diffusers(self, values: dict[str, Any], path: Path) -> AutoencoderConfig:
        """Return the configuration of an AutoencoderKL of diffusers, whose defaults stand for absent fields."""
        if values.get("act_fn", "silu") != "silu":
            raise WeightsError(f"{path}: act_fn is {values['act_fn']!r}, expected 'silu'")

        blocks = values.get("down_block_types", [])
        supported = (PLAIN_BLOCKS[0], ATTENTION_BLOCKS[0])
        if not isinstance(blocks, list) or any(kind not in supported for kind in blocks):
            raise WeightsError(f"{path}: down_block_types {blocks!r:.80} are not supported, expected {list(supported)}")

        if "attention_levels" in values:
            raise WeightsError(f"{path}: attention_levels is no field of diffusers; down_block_types say them")

        levels = [level for level, kind in enumerate(blocks) if kind == ATTENTION_BLOCKS[0]]
        theirs = {name: value for name, value in values.items() if name not in NOT_THEIRS}
        return super().from_diffusers(THEIR_DEFAULTS | theirs | {"attention_levels": levels}, path)

    def clients(self, config: AutoencoderConfig) -> list[str]:
        """List the programs that load a network of this configuration."""
        if self.oddities(config):
            return ANY_NETWORK
        latent, widths = config.latent_channels, config.block_out_channels
        clients = ["diffusers"] if latent in (32, 64) else ["diffusers", "ComfyUI"]

        is_sd = latent == LATENT_CHANNELS["sd"]
        is_sd3_or_flux = latent == LATENT_CHANNELS["flux"] and not (config.use_quant_conv or config.use_post_quant_conv)
        if widths == SD_WIDTHS and (is_sd or is_sd3_or_flux):
            knows_family = is_sd or has_scale_of("sd3", config)
            return clients + WEB_UIS + (["A1111"] if knows_family else [])
        return clients + (["Forge"] if widths == X4_WIDTHS and is_sd else []) + ANY_NETWORK[1:]

    def oddities(self, config: AutoencoderConfig) -> list[str]:
        """List the settings that no web UI supports: widths, layers, groups, attention, image channels."""
        found = {
            f"widths {config.block_out_channels}": config.block_out_channels not in (SD_WIDTHS, X4_WIDTHS),
            f"{config.layers_per_block} layers per block": config.layers_per_block != 2,
            f"groups of {config.norm_num_groups}": config.norm_num_groups != 32,
            "no attention in the middle": not config.mid_block_add_attention,
            "attention in levels": bool(config.attention_levels),
            f"{config.in_channels} image channels": (config.in_channels, config.out_channels) != (3, 3),
        }
        return [oddity for oddity, is_there in found.items() if is_there]

    def about_clients(self, config: AutoencoderConfig) -> list[str]:
        """Warn where not every web UI loads the network, or where diffusers loads it and fails later."""
        clients = self.clients(config)
        if not set(WEB_UIS) <= set(clients):
            own = f"f{config.downsample_factor} with {config.latent_channels} latent channels"
            able = f"only {' and '.join(clients)} can load it ({', '.join(self.oddities(config)) or own})"
            return [f"{able}; the other programs expect a known family's network"]

        is_sd = config.latent_channels == LATENT_CHANNELS["sd"]
        if is_sd and not config.use_post_quant_conv and config.force_upcast:
            fails = "diffusers' SDXL pipelines fail in float16 on a folder without post_quant_conv"
            return [f"{fails}; use the single file"]
        return []

    def about_scale(self, config: AutoencoderConfig, family: str | None) -> list[str]:
        """Warn where web UIs and pipelines take a scale from the family that is not this one."""
        families = families_of(config) if family is None else [family]
        if not families or self.oddities(config):
            return []

        lines = []
        if not any(has_scale_of(name, config) for name in families):
            constants = " or ".join(f"{FAMILIES[name][0]} ({name})" for name in families)
            lines.append(
                f"web UIs and ComfyUI will use {constants}, not scaling_factor {config.scaling_factor:.5g}: with their "
                f"diffusion models images come out washed out or too harsh; for them keep the base's latents"
            )
        if config.shift_factor is None and "flux" in families:
            lines.append("SD3 and FLUX pipelines need a shift_factor, and there is none; vae measure --write finds one")
        return lines


def _with_scale_beside(state: State, config: AutoencoderConfig, family: str | None) -> AutoencoderConfig:
    """Return `config` with the scale that the rest of the checkpoint `state` shows: its family's, or Playground's."""
    if set(PLAYGROUND) <= state.keys():
        mean, std = (state[name].flatten().tolist() for name in PLAYGROUND)
        return config.with_scale(PLAYGROUND_SCALE, latents_mean=mean, latents_std=std)
    return config if family is None else config.with_scale(*FAMILIES[family])


FORMAT = LDMFormat("kl")
