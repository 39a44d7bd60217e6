"""The model presets as the YAML says, read the way users get them."""

from functools import partial
from pathlib import Path
from typing import cast

import pytest
from omegaconf import OmegaConf

from vae.config.model import AutoencoderConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY_PRESETS = ("taef2", "taesd", "taesd3")
PRESETS = sorted({path.stem for path in (CONFIGS / "model").glob("*.yaml")} - {*TINY_PRESETS})  # of KL autoencoders
TWINS = {"sdxl", "sd3"}  # networks of the shape of sd and flux, at full size: `make test-all` has them too
AT_FULL_SIZE = [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in PRESETS]

NETWORKS = {  # small ones, one of each kind
    "sd-like": AutoencoderConfig(block_out_channels=[16, 32, 32], layers_per_block=1, norm_num_groups=4),
    "one level": AutoencoderConfig(block_out_channels=[16], norm_num_groups=4),
    "no attention, no quant convolutions": AutoencoderConfig(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "attention in levels": AutoencoderConfig(
        block_out_channels=[8, 16, 16], norm_num_groups=4, attention_levels=[1, 2]
    ),
}

TINY = partial(  # widths of 8, of the tiny architecture
    AutoencoderConfig,
    architecture="tiny",
    block_out_channels=[8] * 4,
    layers_per_block=3,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
    scaling_factor=1.0,
    force_upcast=False,
)


def preset(name: str) -> AutoencoderConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(AutoencoderConfig), OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    )
    return cast(AutoencoderConfig, OmegaConf.to_object(merged))
