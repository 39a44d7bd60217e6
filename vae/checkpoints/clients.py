"""Which programs can hold an autoencoder, and what they will get wrong about it.

Read off their loaders: A1111 1.10, Forge (2025-06), ComfyUI 0.3 to 0.5, SD.Next (2026-07), kohya sd-scripts (2026-02).
All but diffusers take the architecture from the diffusion model's family and the scaling factor from a constant.
"""

import math

from vae.checkpoints.families import FAMILIES, LATENT_CHANNELS
from vae.models.autoencoder import AutoencoderConfig

SD_WIDTHS = [128, 256, 512, 512]
X4_WIDTHS = [128, 256, 512]
WEB_UIS = ["A1111", "Forge", "SD.Next", "kohya sd-scripts"]
SAME_SCALE = 0.01  # relative; what a few per cent do to an image is not seen


def clients_of(config: AutoencoderConfig) -> list[str]:
    """The programs that load such a network."""
    clients = ["diffusers"]
    if not oddities(config):
        wide, latent = config.block_out_channels, config.latent_channels
        if latent not in (32, 64):
            clients.append("ComfyUI")
        if wide == SD_WIDTHS and latent in LATENT_CHANNELS.values():
            clients += WEB_UIS
        elif wide == X4_WIDTHS and latent == LATENT_CHANNELS["sd"]:
            clients.append("Forge")
    return clients


def oddities(config: AutoencoderConfig) -> list[str]:
    """What no client but diffusers has."""
    found = {
        f"widths {config.block_out_channels}": config.block_out_channels not in (SD_WIDTHS, X4_WIDTHS),
        f"{config.layers_per_block} layers per block": config.layers_per_block != 2,
        f"groups of {config.norm_num_groups}": config.norm_num_groups != 32,
        "no attention in the middle": not config.mid_block_add_attention,
        "attention in levels": bool(config.attention_levels),
        f"{config.in_channels} image channels": (config.in_channels, config.out_channels) != (3, 3),
    }
    return [oddity for oddity, is_there in found.items() if is_there]


def warnings_about(config: AutoencoderConfig, family: str | None = None) -> list[str]:
    """What somebody who hands this autoencoder over must know, to a diffusion model of `family` if that is known."""
    return [*_about_clients(config), *_about_scale(config, family)]


def _about_clients(config: AutoencoderConfig) -> list[str]:
    clients, odd = clients_of(config), oddities(config)
    if not set(WEB_UIS) <= set(clients):
        why = ", ".join(odd) or f"f{config.downsample_factor} with {config.latent_channels} latent channels"
        return [f"only {' and '.join(clients)} can load it ({why}); the other programs expect a known family's network"]
    is_sd = config.latent_channels == LATENT_CHANNELS["sd"]
    if is_sd and not config.use_post_quant_conv and config.force_upcast:
        return ["diffusers' SDXL pipelines fail in float16 on a folder without post_quant_conv; use the single file"]
    return []


def _about_scale(config: AutoencoderConfig, family: str | None) -> list[str]:
    fitting = [name for name, channels in LATENT_CHANNELS.items() if channels == config.latent_channels]
    families = fitting if family is None else [family]
    if not families or set(clients_of(config)) == {"diffusers"}:
        return []
    if not any(is_scale_of(name, config) for name in families):
        constants = " or ".join(f"{FAMILIES[name][0]} ({name})" for name in families)
        return [
            f"scaling_factor {config.scaling_factor:.5g} is no family's: web UIs and ComfyUI will use {constants}, so "
            f"with their diffusion models images come out washed out or too harsh; for them keep the base's latents"
        ]
    if config.shift_factor is None and fitting == ["sd3", "flux"]:
        return ["SD3 and FLUX pipelines need a shift_factor, and there is none; vae measure --write finds one"]
    return []


def is_scale_of(family: str, config: AutoencoderConfig) -> bool:
    return math.isclose(config.scaling_factor, FAMILIES[family][0], rel_tol=SAME_SCALE)
