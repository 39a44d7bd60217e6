import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vae.errors import require

if TYPE_CHECKING:
    pass


@dataclass
class GuardConfig:
    """What becomes of an update of which a loss or a gradient is not finite.

    `on_non_finite`: "stop" the run; "skip" the update; "rollback" to the weights and the optimiser of the last
    checkpoint, and go on with the next images. The latter two at most `limit` times in a run, then it stops.
    """

    on_non_finite: str = "stop"
    limit: int = 3

    def __post_init__(self) -> None:
        known = self.on_non_finite in POLICIES
        require(known, f"guard.on_non_finite={self.on_non_finite!r}", f"one of {list(POLICIES)}")
        require(self.limit >= 1, f"guard.limit={self.limit}", "1 or more")


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
