"""One optimiser for both networks, each with its own learning rate, schedule and clipping."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vae.errors import require
from vae.training.frozen import learning

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass
class OptimConfig:
    """Learning rates are literal: never scaled by batch size or processes. Betas are LDM's.

    `gradient_clip` is the largest norm of each network's gradient (0: no clipping); `warmup_updates` count for either
    network from its own start.
    """

    name: str = "adam"
    learning_rate: float = 1.0e-4
    discriminator_learning_rate: float = 1.0e-4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_updates: int = 0
    gradient_clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for key, choices in {"name": OPTIMISERS, "schedule": SCHEDULES}.items():
            require(getattr(self, key) in choices, f"optim.{key}={getattr(self, key)!r}", f"one of {sorted(choices)}")
        for key in ("learning_rate", "discriminator_learning_rate"):
            require(0 < getattr(self, key) < math.inf, f"optim.{key}={getattr(self, key)}", "a positive number")
        for key in ("weight_decay", "warmup_updates", "gradient_clip"):
            require(0 <= getattr(self, key) < math.inf, f"optim.{key}={getattr(self, key)}", "0 or more")
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(betas, f"optim.betas={self.betas}", "two numbers from 0 to below 1")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay={self.ema_decay}", "from 0 (no averaging) to below 1")


def constant(_: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, "SGDR", 2017)."""
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
    """The optimiser and the schedule that is stepped once an update, for a run of `updates`.

    The networks begin to learn at `starts`, autoencoder and discriminator.

    `fused` must not be used under float16's loss scaling: a fused step unscales by itself, after the clipping.
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
    """What the learning rate is multiplied with at an update: linear warm-up from `start`, then the schedule.

    A function and not an object: LambdaLR would put an object into the checkpoint.
    """
    schedule, warmup = SCHEDULES[config.schedule], config.warmup_updates

    def factor(update: int) -> float:
        warm = min(1.0, (max(0, update - start) + 1) / warmup) if warmup else 1.0
        return warm * schedule(min(1.0, update / updates))

    return factor
