"""The model presets as the YAML says, read the way users get them."""

from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from vae.models.autoencoder import AutoencoderConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def preset(name: str) -> AutoencoderConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(AutoencoderConfig), OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    )
    return cast(AutoencoderConfig, OmegaConf.to_object(merged))
