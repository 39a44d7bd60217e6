"""Which parts of an autoencoder learn."""

import difflib
from collections.abc import Sequence

from torch import nn

from vae.errors import require
from vae.models.interface import Autoencoder


def freeze(autoencoder: Autoencoder, frozen: Sequence[str], trained: Sequence[str] = ()) -> None:
    """No gradient for the `frozen` modules by name, "encoder" or "decoder.up_blocks.0", or for all but the `trained`.

    Raises InputError for a name that is none, and where nothing is left to learn.
    """
    if trained:
        autoencoder.requires_grad_(False)
    for module in _named(autoencoder, "frozen", frozen):
        module.requires_grad_(False)
    for module in _named(autoencoder, "trained", trained):
        module.requires_grad_(True)
    learns = _learns(autoencoder)
    require(learns or not trained, f"trained={list(trained)}", "parts that have weights")
    require(learns, f"frozen={list(frozen)}", "fewer parts: nothing would learn")


def posterior_learns(autoencoder: Autoencoder) -> bool:
    """False where all that the posterior depends on is frozen: a given image then has the same posterior for ever."""
    return _learns(autoencoder.encoder, autoencoder.quant_conv)


def decoder_learns(autoencoder: Autoencoder) -> bool:
    return _learns(autoencoder.decoder, autoencoder.post_quant_conv)


def learning(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _learns(*parts: nn.Module) -> bool:
    return any(map(learning, parts))


def _named(autoencoder: Autoencoder, key: str, names: Sequence[str]) -> list[nn.Module]:
    modules = {name: module for name, module in autoencoder.named_modules() if name}
    for name in names:
        (nearest,) = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        require(name in modules, f"{key}={name!r}", f"a module of the autoencoder; did you mean {nearest!r}?")
    return [modules[name] for name in names]
