"""The registry of autoencoders, by the name of their architecture."""

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.autoencoder_tiny import AutoencoderTiny
from vae.models.base import Autoencoder

ARCHITECTURES: dict[str, type[Autoencoder]] = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder that `config.architecture` names, with random weights."""
    return ARCHITECTURES[config.architecture](config)


def as_kl(model: Autoencoder, given: str, remedy: str) -> AutoencoderKL:
    """Return `model` as an AutoencoderKL, for what tiny autoencoders do not have.

    Raises InputError where it is tiny: `given` names what is asked of it, `remedy` what is expected instead.
    """
    require(isinstance(model, AutoencoderKL), f"{given} with a tiny autoencoder", remedy)
    assert isinstance(model, AutoencoderKL)
    return model
