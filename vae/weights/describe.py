"""Describe an autoencoder's file for people: what it is, which programs load it, and what they get wrong about it.

What programs load is read from their loaders: A1111 1.10, Forge (2025-06), ComfyUI 0.3 to 0.5, SD.Next (2026-07) and
kohya sd-scripts (2026-02). All but diffusers take the architecture from the diffusion model's family and the scaling
factor from a constant.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from vae.config.model import AutoencoderConfig
from vae.weights.diffusers import KINDS
from vae.weights.families import (
    FAMILIES,
    LATENT_CHANNELS,
    SD_WIDTHS,
    X4_WIDTHS,
    families_of,
    has_scale_of,
    is_published_network,
)
from vae.weights.loaded import LoadedWeights
from vae.weights.safetensors_io import narrowed

ANY_NETWORK = ["diffusers", "kohya sd-scripts (folder)"]
TINY_WIDTHS, TINY_LAYERS = [64] * 4, 3
WEB_UIS = ["Forge", "SD.Next", "kohya sd-scripts"]


def clients_of(config: AutoencoderConfig) -> list[str]:
    """List the programs that load a network of this configuration."""
    if config.architecture == "tiny":
        theirs = [] if oddities(config) else ["ComfyUI (newer ones, as taef2)" if config.mid_block_pool else "ComfyUI"]
        return theirs if config.mid_block_pool else ["diffusers", *theirs]

    if oddities(config):
        return ANY_NETWORK
    clients, latent, widths = ["diffusers"], config.latent_channels, config.block_out_channels

    if latent not in (32, 64):
        clients.append("ComfyUI")

    is_sd = latent == LATENT_CHANNELS["sd"]
    is_sd3_or_flux = latent == LATENT_CHANNELS["flux"] and not (config.use_quant_conv or config.use_post_quant_conv)
    if widths == SD_WIDTHS and (is_sd or is_sd3_or_flux):
        knows_family = is_sd or has_scale_of("sd3", config)
        return clients + WEB_UIS + (["A1111"] if knows_family else [])
    return clients + (["Forge"] if widths == X4_WIDTHS and is_sd else []) + ANY_NETWORK[1:]


def oddities(config: AutoencoderConfig) -> list[str]:
    """List the settings of a network that no web UI supports, in words."""
    is_kl = config.architecture == "kl"
    widths, layers = ((SD_WIDTHS, X4_WIDTHS), 2) if is_kl else ((TINY_WIDTHS,), TINY_LAYERS)

    found = {
        f"widths {config.block_out_channels}": config.block_out_channels not in widths,
        f"{config.layers_per_block} layers per block": config.layers_per_block != layers,
        f"groups of {config.norm_num_groups}": is_kl and config.norm_num_groups != 32,
        "no attention in the middle": is_kl and not config.mid_block_add_attention,
        "attention in levels": bool(config.attention_levels),
        f"{config.in_channels} image channels": (config.in_channels, config.out_channels) != (3, 3),
    }
    return [oddity for oddity, is_there in found.items() if is_there]


def warnings_of(found: LoadedWeights, family: str | None = None) -> list[str]:
    """List what somebody who passes `found` on must know, in words.

    `family` is the family of the diffusion model that it is for, where that is known.
    """
    if found.config.architecture == "tiny" and found.family is None and families_of(found.config):
        whose = f"whose latents it has the file does not tell ({' or '.join(families_of(found.config))})"
        return [*warnings_about(found.config), f"{whose}: ComfyUI must know it of one file; --family says which"]

    if found.scale_is_known:
        return [*warnings_about(found.config, family), *_about_groups(found)]

    fitting, lines = families_of(found.config), [*_about_clients(found.config), *_about_groups(found)]
    if len(fitting) > 1 and family is None and not oddities(found.config):
        guess = f"scaling_factor {found.config.scaling_factor:g} is assumed; --family says which"
        lines.append(f"the file does not tell whether it is of {' or '.join(fitting)}: {guess}")
    return lines


def warnings_about(config: AutoencoderConfig, family: str | None = None) -> list[str]:
    """List the warnings about a configuration whose scaling factor is known, in words."""
    return [*_about_clients(config), *_about_scale(config, family)]


def _about_clients(config: AutoencoderConfig) -> list[str]:
    """Warn where only some programs can load the network."""
    clients, odd = clients_of(config), oddities(config)
    if config.architecture == "tiny":
        able = f"only {' and '.join(clients)} can" if clients else "no other program can"
        return [f"{able} load it ({', '.join(odd)}); the others expect a published tiny network"] if odd else []

    if not set(WEB_UIS) <= set(clients):
        why = ", ".join(odd) or f"f{config.downsample_factor} with {config.latent_channels} latent channels"
        return [f"only {' and '.join(clients)} can load it ({why}); the other programs expect a known family's network"]

    is_sd = config.latent_channels == LATENT_CHANNELS["sd"]
    if is_sd and not config.use_post_quant_conv and config.force_upcast:
        return ["diffusers' SDXL pipelines fail in float16 on a folder without post_quant_conv; use the single file"]
    return []


def _about_groups(found: LoadedWeights) -> list[str]:
    """Warn where the number of groups is assumed.

    A published network needs no warning: every program assumes the same number for it.
    """
    if found.groups_are_known or is_published_network(found.config):
        return []
    return [f"the file does not tell norm_num_groups: {found.config.norm_num_groups} is assumed; --config states it"]


def _about_scale(config: AutoencoderConfig, family: str | None) -> list[str]:
    """Warn where programs will use another scale than the configuration states."""
    families = families_of(config) if family is None else [family]
    if config.architecture == "tiny":
        scaled = f"programs take a tiny autoencoder's latents as scaled: scaling_factor {config.scaling_factor:.5g}"
        return [] if config.scaling_factor == 1.0 else [f"{scaled} is for a diffusion model of your own"]

    if not families or oddities(config):
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


HALF = torch.finfo(torch.float16)
LAYOUTS = {"ldm": "LDM names, as in web UIs", "diffusers": "diffusers names", "taesd": "TAESD's names, as in ComfyUI"}
FAMILY_NAMES = {"sd": "SD 1.x/2.x", "sdxl": "SDXL", "x4": "the x4 upscaler", "sd3": "SD3", "flux": "FLUX.1"}


def title_of(found: LoadedWeights) -> str:
    """Return a title: class, downsampling factor, latent channels and family."""
    config = found.config
    return f"{KINDS[config.architecture]} f{config.downsample_factor}c{config.latent_channels}, {family_words(found)}"


def facts_of(found: LoadedWeights) -> dict[str, Any]:
    """Return facts about the file and its weights: {topic: words}."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.state.values())
    whence = "stated" if found.stated else "read from the tensors"
    groups = "" if found.groups_are_known else f", {found.config.norm_num_groups} groups are assumed"
    tensors, parameters = len(found.state), sum(tensor.numel() for tensor in found.state.values())
    return {
        "layout": LAYOUTS[found.layout],
        "weights": {"EMA": "averaged (EMA)"}.get(found.kind, found.kind),
        "stored as": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items()),
        "parameters": f"{parameters:,} in {tensors} tensors",
        "loads in": ", ".join(clients_of(found.config)) or "no other program",
        "configuration": f"{whence}{groups}",
    }


def notes_of(found: LoadedWeights) -> dict[str, str]:
    """Return the notes of a file of ours about its latents, its training and its architecture: {topic: words}."""
    topics = asdict(found.notes)
    return {f"{topic}: {name}": _short(value) for topic, noted in topics.items() for name, value in noted.items()}


def family_words(found: LoadedWeights) -> str:
    """Name the family that the file states, or else the families that it may belong to."""
    if found.family is not None and found.config.architecture == "tiny":
        return f"for the latents of {FAMILY_NAMES[found.family]}"
    if found.family is not None:
        return f"of the {FAMILY_NAMES[found.family].removeprefix('the ')} checkpoint it is in"

    config = found.config
    fitting = families_of(config)
    scaled = [name for name in fitting if found.stated and has_scale_of(name, config)]
    names = [FAMILY_NAMES[name] for name in scaled or fitting]
    if not names or oddities(config):
        return "of no known family"
    return f"of the family of {' or '.join(names)}" + ("" if scaled else " by its shape")


def soundness(found: LoadedWeights) -> tuple[list[str], dict[str, str]]:
    """Return (names of tensors with NaN or infinite values, facts about how the weights fit into float16)."""
    broken, dead, largest = [], [], 0.0
    for name, stored in found.state.items():
        sizes = stored.float().abs()
        if not sizes.isfinite().all():
            broken.append(name)
            continue
        largest = max(largest, sizes.max().item())
        if name.endswith("weight") and not sizes.any():
            dead.append(name)

    lost = narrowed({name: tensor for name, tensor in found.state.items() if name not in broken}, torch.float16)
    small, vanished = lost.fewer / max(lost.total, 1), lost.zero / max(lost.total, 1)

    facts = {
        "finite": f"no: {len(broken)} tensors hold NaN or infinite values" if broken else "yes",
        "largest weight": f"{largest:.4g}, {HALF.max / max(largest, 1e-30):,.0f} times below float16's limit",
        "small in float16": f"{small:.3%} of weights lose digits, {vanished:.3%} vanish",
    }
    return broken, facts | ({"all zero": f"{len(dead)} weights, first {dead[:3]}"} if dead else {})


def _short(value: object) -> str:
    """Format a value on one line, numbers with six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)
