"""Networks by the name of their architecture."""

from importlib import import_module

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.base import Autoencoder


def network_of(config: AutoencoderConfig) -> type[Autoencoder]:
    """Return the class of the network.

    The configuration cannot refer to it, since it imports no network. So the module is found by the architecture's
    name: vae/models/autoencoder_NAME.py.
    """
    return getattr(import_module(f"vae.models.autoencoder_{config.architecture}"), config.kind.network)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder that `config.architecture` names, with random weights."""
    return network_of(config)(config)


def as_kl(model: Autoencoder, given: str, remedy: str) -> AutoencoderKL:
    """Return `model` as an AutoencoderKL, for what other autoencoders do not have.

    Raises InputError where it is another: `given` names what is asked of it, `remedy` what is expected instead.
    """
    require(isinstance(model, AutoencoderKL), f"{given} with a {model.config.architecture} autoencoder", remedy)
    assert isinstance(model, AutoencoderKL)
    return model
