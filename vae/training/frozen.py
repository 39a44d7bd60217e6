"""Which parts of an autoencoder learn."""

import difflib
from collections.abc import Sequence

from vae.errors import require
from vae.models.autoencoder import AutoencoderKL


def freeze(autoencoder: AutoencoderKL, frozen: Sequence[str]) -> None:
    """No gradient for the modules of these names, "encoder" or "decoder.up_blocks.0".

    Raises InputError for a name that is none, and where nothing is left to learn.
    """
    modules = {name: module for name, module in autoencoder.named_modules() if name}
    for name in frozen:
        (nearest,) = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        require(name in modules, f"frozen={name!r}", f"a module of the autoencoder; did you mean {nearest!r}?")
        modules[name].requires_grad_(False)
    learns = any(parameter.requires_grad for parameter in autoencoder.parameters())
    require(learns, f"frozen={list(frozen)}", "fewer parts: nothing would learn")


def posterior_learns(autoencoder: AutoencoderKL) -> bool:
    """False where all that the posterior depends on is frozen: a given image then has the same posterior for ever."""
    parts = (autoencoder.encoder, autoencoder.quant_conv)
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())
