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
from vae.weights.families import families_of, has_scale_of, is_published_network
from vae.weights.formats import Format, format_of
from vae.weights.loaded import LoadedWeights
from vae.weights.safetensors_io import narrowed


def clients_of(config: AutoencoderConfig) -> list[str]:
    """List the programs that load a network of this configuration."""
    return _format(config).clients(config)


def _format(config: AutoencoderConfig) -> Format:
    return format_of(config.architecture)


def warnings_of(found: LoadedWeights, family: str | None = None) -> list[str]:
    """List what somebody who passes `found` on must know, in words.

    `family` is the family of the diffusion model that it is for, where that is known.
    """
    if found.config.latents_are_scaled and found.family is None and families_of(found.config):
        whose = f"whose latents it has the file does not tell ({' or '.join(families_of(found.config))})"
        return [*warnings_about(found.config), f"{whose}: ComfyUI must know it of one file; --family says which"]

    if found.scale_is_known:
        return [*warnings_about(found.config, family), *_about_groups(found)]

    fitting = families_of(found.config)
    lines = [*_format(found.config).about_clients(found.config), *_about_groups(found)]
    if len(fitting) > 1 and family is None and not _format(found.config).oddities(found.config):
        guess = f"scaling_factor {found.config.scaling_factor:g} is assumed; --family says which"
        lines.append(f"the file does not tell whether it is of {' or '.join(fitting)}: {guess}")
    return lines


def warnings_about(config: AutoencoderConfig, family: str | None = None) -> list[str]:
    """List the warnings about a configuration whose scaling factor is known, in words."""
    return [*_format(config).about_clients(config), *_format(config).about_scale(config, family)]


def _about_groups(found: LoadedWeights) -> list[str]:
    """Warn where the number of groups is assumed.

    A published network needs no warning: every program assumes the same number for it.
    """
    if found.groups_are_known or is_published_network(found.config):
        return []
    return [f"the file does not tell norm_num_groups: {found.config.norm_num_groups} is assumed; --config states it"]


HALF = torch.finfo(torch.float16)
FAMILY_NAMES = {"sd": "SD 1.x/2.x", "sdxl": "SDXL", "x4": "the x4 upscaler", "sd3": "SD3", "flux": "FLUX.1"}


def title_of(found: LoadedWeights) -> str:
    """Return a title: class, downsampling factor, latent channels and family."""
    config = found.config
    return f"{config.kind.network} f{config.downsample_factor}c{config.latent_channels}, {family_words(found)}"


def facts_of(found: LoadedWeights) -> dict[str, Any]:
    """Return facts about the file and its weights: {topic: words}."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.state.values())
    whence = "stated" if found.stated else "read from the tensors"
    groups = "" if found.groups_are_known else f", {found.config.norm_num_groups} groups are assumed"
    parameters = sum(tensor.numel() for tensor in found.state.values())
    return {
        "layout": "diffusers names" if found.layout == "diffusers" else _format(found.config).words,
        "weights": found.kind,
        "stored as": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items()),
        "parameters": f"{parameters:,} in {len(found.state)} tensors",
        "loads in": ", ".join(clients_of(found.config)) or "no other program",
        "configuration": f"{whence}{groups}",
    }


def notes_of(found: LoadedWeights) -> dict[str, str]:
    """Return the notes of a file of ours about its latents, its training and its architecture: {topic: words}."""
    topics = asdict(found.notes)
    return {f"{topic}: {name}": _short(value) for topic, noted in topics.items() for name, value in noted.items()}


def everything_of(found: LoadedWeights) -> dict[str, Any]:
    """Return all that is known of a file: facts, every setting of the network, and every note."""
    return facts_of(found) | asdict(found.config) | notes_of(found)


def summary_of(found: LoadedWeights, values: dict[str, str]) -> dict[str, str]:
    """Return the little that most people want to know of a file. `values` are those of `soundness`."""
    config = found.config
    facts = facts_of(found)
    is_sound = values["finite"] == "yes"
    groups = "no groups" if not config.kind.has_group_norms else f"{config.norm_num_groups} groups"
    shift = "" if config.shift_factor is None else f", shift_factor {config.shift_factor:g}"
    assumed = "" if found.scale_is_known else ", assumed"
    scale = f"scaling_factor {config.scaling_factor:.6g}{shift}{assumed}"
    scale = "normalised by channel" if config.latents_std else scale

    summary = {
        "verdict": f"sound, and loads in {facts['loads in']}"
        if is_sound
        else f"damaged: {values['finite'].removeprefix('no: ')}",
        "weights": f"{found.kind}, {facts['stored as']}, {facts['parameters']}; {facts['layout']}",
        "float16": f"{values['small in float16']}; largest weight {values['largest weight']}",
        "latents": f"{config.latent_channels} channels, {scale}",
        "network": f"widths {config.block_out_channels}, {config.layers_per_block} layers a block, {groups}",
    }
    training = found.notes.training
    if training:
        measured = (training.get("validation") or {}).get("metrics") or {}
        metrics = "".join(f", {name} {value:.4g}" for name, value in measured.items())
        summary["trained"] = f"{training.get('updates')} updates at {training.get('resolution')} px{metrics}"
    return summary | {"more": "--verbose lists every setting and note"}


def family_words(found: LoadedWeights) -> str:
    """Name the family that the file states, or else the families that it may belong to."""
    if found.family is not None and found.config.latents_are_scaled:
        return f"for the latents of {FAMILY_NAMES[found.family]}"
    if found.family is not None:
        return f"of the {FAMILY_NAMES[found.family].removeprefix('the ')} checkpoint it is in"

    config = found.config
    fitting = families_of(config)
    scaled = [name for name in fitting if found.stated and has_scale_of(name, config)]
    names = [FAMILY_NAMES[name] for name in scaled or fitting]
    if not names or _format(config).oddities(config):
        return "of no known family"
    return f"of the family of {' or '.join(names)}" + ("" if scaled else " by its shape")


def soundness(found: LoadedWeights) -> tuple[list[str], dict[str, str]]:
    """Return (names of tensors with NaN or infinite values, facts about how the weights fit into float16)."""
    broken: list[str] = []
    dead: list[str] = []
    largest = 0.0

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
