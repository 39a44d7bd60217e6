"""The diffusion models that autoencoders belong to: their constants, and how a file gives itself away."""

import math
from collections.abc import Iterable

from vae.models.autoencoder import AutoencoderConfig

SD_WIDTHS = [128, 256, 512, 512]
X4_WIDTHS = [128, 256, 512]
SAME_SCALE = 0.01  # relative; what a few per cent do to an image is not seen
LATENT_CHANNELS = {"sd": 4, "sdxl": 4, "x4": 4, "sd3": 16, "flux": 16}
FAMILIES: dict[str, tuple[float, float | None]] = {  # scaling and shift factor; x4 is the upscaler
    "sd": (0.18215, None),
    "sdxl": (0.13025, None),
    "x4": (0.08333, None),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
}
SIGNS = {  # a tensor whose name contains this says which diffusion model a full checkpoint holds; the first that fits
    "joint_blocks.": "sd3",
    "double_blocks.": "flux",
    "conditioner.embedders.": "sdxl",
    "cond_stage_model.": "sd",
    "model.diffusion_model.label_emb.": "sdxl",
    "model.diffusion_model.input_blocks.": "sd",
}
LOOKS = {  # what a file without an autoencoder is, by a part of its names; the first that fits
    "average.decoder.": "a checkpoint of a training run; vae export publishes its weights",
    "lora_": "a LoRA",
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


def families_of(config: AutoencoderConfig) -> list[str]:
    """The families whose latents have so many channels and whose autoencoder as many levels; often more than one."""
    is_x4 = config.block_out_channels == X4_WIDTHS
    fitting = [name for name, channels in LATENT_CHANNELS.items() if channels == config.latent_channels]
    return [name for name in fitting if (name == "x4") == (is_x4 and config.latent_channels == LATENT_CHANNELS["x4"])]


def has_scale_of(family: str, config: AutoencoderConfig) -> bool:
    return math.isclose(config.scaling_factor, FAMILIES[family][0], rel_tol=SAME_SCALE)


def looks_like(names: Iterable[str]) -> str:
    """A sentence about a file that has no autoencoder."""
    names = sorted(names)
    for sign, kind in LOOKS.items():
        if any(sign in name for name in names):
            return f"this looks like {kind}"
    return f"its {len(names)} tensors are not a KL autoencoder's (first {names[:3]})"
