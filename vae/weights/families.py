"""The families of diffusion models that autoencoders belong to: their constants, and how a file shows its family."""

import math
import re
from collections.abc import Iterable

from vae.config.model import AutoencoderConfig

SD_WIDTHS = [128, 256, 512, 512]
X4_WIDTHS = [128, 256, 512]
SAME_SCALE = 0.01  # relative; an error of a few per cent in the scale is not visible in an image
LATENT_CHANNELS = {"sd": 4, "sdxl": 4, "x4": 4, "sd3": 16, "flux": 16}
FAMILIES: dict[str, tuple[float, float | None]] = {  # scaling and shift factor; x4 is the upscaler
    "sd": (0.18215, None),
    "sdxl": (0.13025, None),
    "x4": (0.08333, None),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
}
SIGNS = {  # pattern in a tensor's name: the diffusion model of a full checkpoint; the first match counts
    r"joint_blocks\.": "sd3",
    r"double_blocks\.": "flux",
    r"low_scale_model\.|\.label_emb\.weight$": "x4",  # a table of noise levels; SDXL has two layers there
    r"cond_stage_model\.": "sd",
    r"conditioner\.embedders\.[1-9]\d*\.|\.label_emb\.": "sdxl",
    r"conditioner\.embedders\.": "sd",  # one text encoder alone: SD 2 in sgm's names
    r"model\.diffusion_model\.input_blocks\.": "sd",
}
LOOKS = {  # what a file without an autoencoder is, by a part of a tensor's name; the first match counts
    "ema_model.decoder.": "a checkpoint of a training run; vae export publishes its weights",
    "average.decoder.": "a checkpoint of a training run; vae export publishes its weights",  # of the first version
    "lora_": "a LoRA",
    "low_scale_model.": "the x4 upscaler's diffusion model without a VAE",
    ".label_emb.weight": "the x4 upscaler's diffusion model without a VAE",
    ".label_emb.": "an SDXL diffusion model without a VAE",
    "double_blocks.": "a FLUX diffusion model without a VAE",
    "joint_blocks.": "an SD3 diffusion model without a VAE",
    "model.diffusion_model.": "an SD diffusion model without a VAE",
    "transformer_blocks.": "a diffusion model in diffusers' layout",
    "text_model.": "a text encoder",
    ".SelfAttention.": "a text encoder",
    "taesd_": "a part of a tiny autoencoder (TAESD); the whole of it is needed",
    "decoder.layers.": "a part of a tiny autoencoder (TAESD); the whole of it is needed",
    "encoder.": "an encoder alone; the whole autoencoder is needed",
    "decoder.": "another kind of autoencoder",
}


def family_of(names: Iterable[str]) -> str | None:
    """Return the family of the diffusion model whose tensors are among `names`, or None."""
    names = list(names)
    return next((family for sign, family in SIGNS.items() if any(re.search(sign, name) for name in names)), None)


def family_beside(names: Iterable[str], config: AutoencoderConfig) -> str | None:
    """Return the family of an autoencoder with this configuration among `names`, or None where it cannot be told.

    It is the diffusion model's family if that family can have an autoencoder of this shape. The x4 upscaler is an SD 2
    except for a few names that not all of its checkpoints have, but its autoencoder has another shape: so the shape
    decides where only one family fits it.
    """
    family, fitting = family_of(names), families_of(config)
    if family is None or family in fitting:
        return family
    return fitting[0] if len(fitting) == 1 else None


def families_of(config: AutoencoderConfig) -> list[str]:
    """List the families with this number of latent channels and of levels in the autoencoder.

    There is often more than one.
    """
    is_x4 = config.block_out_channels == X4_WIDTHS
    fitting = [name for name, channels in LATENT_CHANNELS.items() if channels == config.latent_channels]
    return [name for name in fitting if (name == "x4") == (is_x4 and config.latent_channels == LATENT_CHANNELS["x4"])]


def is_published_network(config: AutoencoderConfig) -> bool:
    """Return whether these are the widths of a family's own autoencoder.

    All published autoencoders of these families have groups of 32.
    """
    return bool(families_of(config)) and config.block_out_channels in (SD_WIDTHS, X4_WIDTHS)


def has_scale_of(family: str, config: AutoencoderConfig) -> bool:
    """Return whether the scaling factor is that of `family`, up to one per cent."""
    return math.isclose(config.scaling_factor, FAMILIES[family][0], rel_tol=SAME_SCALE)


def looks_like(names: Iterable[str]) -> str:
    """Describe a file that has no autoencoder, by the names of its tensors, for an error message."""
    names = sorted(names)
    for sign, kind in LOOKS.items():
        if any(sign in name for name in names):
            return f"this looks like {kind}"
    return f"its {len(names)} tensors are not a KL autoencoder's (first {names[:3]})"
