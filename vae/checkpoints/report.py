"""What an autoencoder's file is, in words and numbers for people."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from vae.checkpoints.clients import clients_of, oddities
from vae.checkpoints.diffusers import KINDS
from vae.checkpoints.families import families_of, has_scale_of
from vae.checkpoints.found import Found
from vae.checkpoints.writing import narrowed

HALF = torch.finfo(torch.float16)
LAYOUTS = {"ldm": "LDM names, as in web UIs", "diffusers": "diffusers names", "taesd": "TAESD's names, as in ComfyUI"}
FAMILY_NAMES = {"sd": "SD 1.x/2.x", "sdxl": "SDXL", "x4": "the x4 upscaler", "sd3": "SD3", "flux": "FLUX.1"}


def title_of(found: Found) -> str:
    config = found.config
    return f"{KINDS[config.architecture]} f{config.downsample_factor}c{config.latent_channels}, {family_words(found)}"


def facts_of(found: Found) -> dict[str, Any]:
    """About the file and its weights."""
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


def notes_of(found: Found) -> dict[str, str]:
    """What the file says about its latents, its training and its architecture, if it is one of ours."""
    topics = asdict(found.notes)
    return {f"{topic}: {name}": _short(value) for topic, noted in topics.items() for name, value in noted.items()}


def family_words(found: Found) -> str:
    """The family where the file tells it, else those that it may be of."""
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


def soundness(found: Found) -> tuple[list[str], dict[str, str]]:
    """(tensors with NaN or infinite values, how the weights fit into float16)."""
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
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)
