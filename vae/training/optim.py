"""The optimiser of both networks, the EMA of the weights, and which parts of an autoencoder learn.

One optimiser serves both networks; each has its own learning rate, schedule and clipping. The EMA weights are what
validation sees and what is exported.
"""

import difflib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vae.config.optim import OptimConfig
from vae.errors import require
from vae.models.base import Autoencoder

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def constant(_: float) -> float:
    """Return 1, whatever the progress."""
    return 1.0


def cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0 for a progress from 0 to 1 (Loshchilov and Hutter, "SGDR", 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES = {"constant": constant, "cosine": cosine}


def build_optimiser(  # noqa: PLR0917
    config: OptimConfig,
    autoencoder: nn.Module,
    discriminator: nn.Module | None,
    updates: int,
    starts: tuple[int, int],
    fused: bool = False,
) -> tuple[Optimizer, LambdaLR]:
    """Return the optimiser and its schedule, which is stepped once an update, for a run of so many `updates`.

    `starts` are the updates at which autoencoder and discriminator begin to learn.

    `fused` must not be used with float16's loss scaling: a fused step unscales by itself, after the clipping.
    """
    networks = [(autoencoder, config.learning_rate, starts[0])]
    if discriminator is not None:
        networks.append((discriminator, config.discriminator_learning_rate, starts[1]))

    groups = [{"params": learning(network), "lr": rate} for network, rate, _ in networks]
    optimiser = OPTIMISERS[config.name](
        groups,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=fused,
    )

    factors = [_factor(config, updates, start) for _, _, start in networks]
    return optimiser, LambdaLR(optimiser, factors)


def _factor(config: OptimConfig, updates: int, start: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at an update: linear warm-up from `start`, then the schedule.

    It is a function, because LambdaLR would save an object in the checkpoint.
    """
    schedule = SCHEDULES[config.schedule]
    warmup = config.warmup_updates

    def factor(update: int) -> float:
        warm = min(1.0, (max(0, update - start) + 1) / warmup) if warmup else 1.0
        return warm * schedule(min(1.0, update / updates))

    return factor


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """average <- d * average + (1 - d) * model, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up lets a young average forget its random start (as in TensorFlow's ExponentialMovingAverage and LDM).
    Parameters that do not learn are skipped, because arithmetic would turn their -0.0 into 0.0. Buffers are copied.
    """
    warm_decay = min(decay, (1 + updates) / (10 + updates))

    pairs = [(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True) if b.requires_grad]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [kept for kept, _ in pairs], [current for _, current in pairs], 1.0 - warm_decay
    )

    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def freeze(autoencoder: Autoencoder, frozen: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Switch off the gradients of the `frozen` modules, or of all but the `trained` ones.

    Modules are named as in torch, "encoder" or "decoder.up_blocks.0". Raises InputError if there is no module of a
    name, and if nothing is left to learn.
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
    """Return whether anything that the posterior depends on learns.

    If not, an image has the same posterior throughout the run.
    """
    return _learns(autoencoder.encoder, autoencoder.quant_conv)


def decoder_learns(autoencoder: Autoencoder) -> bool:
    """Return whether anything learns that lies between latents and reconstructions."""
    return _learns(autoencoder.decoder, autoencoder.post_quant_conv)


def learning(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _learns(*parts: nn.Module) -> bool:
    """Return whether any parameter of the parts learns."""
    return any(map(learning, parts))


def _named(autoencoder: Autoencoder, key: str, names: Sequence[str]) -> list[nn.Module]:
    """Return the modules of these names. Raises InputError for another name, and suggests the nearest one."""
    modules = {name: module for name, module in autoencoder.named_modules() if name}
    for name in names:
        (nearest,) = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        require(name in modules, f"{key}={name!r}", f"a module of the autoencoder; did you mean {nearest!r}?")
    return [modules[name] for name in names]
