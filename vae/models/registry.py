"""The autoencoders by the name of their architecture."""

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.models.base import Autoencoder

ARCHITECTURES: dict[str, type[Autoencoder]] = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """What `config.architecture` names, with random weights."""
    return ARCHITECTURES[config.architecture](config)


def as_kl(model: Autoencoder, given: str, remedy: str) -> AutoencoderKL:
    """`model`, where `given`, which tiny ones do not have, is asked of it."""
    require(isinstance(model, AutoencoderKL), f"{given} with a tiny autoencoder", remedy)
    assert isinstance(model, AutoencoderKL)
    return model
