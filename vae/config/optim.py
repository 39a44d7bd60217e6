"""The optimiser, learning rates and EMA, and what happens to an update that is not finite."""

from dataclasses import dataclass

from vae.config.fields import Allowed, at_least, below, check_fields, choice, option, positive

OPTIMISERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine")
POLICIES = ("stop", "skip", "rollback")

BETAS = Allowed("two numbers from 0 to below 1", lambda betas: len(betas) == 2 and all(0 <= one < 1 for one in betas))


@dataclass
class OptimConfig:
    """One optimiser for both networks. Learning rates are literal: batch size and processes never scale them."""

    name: str = option("adam", "The optimiser.", allowed=choice(*OPTIMISERS))
    learning_rate: float = option(1.0e-4, "Learning rate of the autoencoder.", allowed=positive())
    discriminator_learning_rate: float = option(1.0e-4, "Learning rate of the discriminator.", allowed=positive())
    betas: list[float] = option([0.5, 0.9], "Adam's decay rates. The default is LDM's.", allowed=BETAS)
    weight_decay: float = option(0.0, "Weight decay of both networks.", allowed=at_least(0))
    schedule: str = option("constant", "How the learning rate goes on after the warm-up.", allowed=choice(*SCHEDULES))
    warmup_updates: int = option(
        0,
        "The learning rate rises linearly during these updates, from each network's own start.",
        unit="updates",
        allowed=at_least(0),
    )
    gradient_clip: float = option(
        1.0, "Largest norm of each network's gradient. 0 turns clipping off.", allowed=at_least(0)
    )
    ema_decay: float = option(
        0.999,
        "Decay of the exponential moving average (EMA) of the autoencoder's weights. 0 keeps the weights as they are.",
        allowed=below(1, "from 0 (no averaging) to below 1"),
    )

    def __post_init__(self) -> None:
        check_fields(self, "optim.")


@dataclass
class GuardConfig:
    """What happens when a loss or a gradient of an update is not finite."""

    on_non_finite: str = option(
        "stop",
        "stop ends the run. skip leaves the update out. rollback restores weights and optimiser from the "
        "last checkpoint and continues with the next images.",
        allowed=choice(*POLICIES),
        may_change=True,
    )
    limit: int = option(
        3, "How often skip or rollback may happen in a run before it stops.", allowed=at_least(1), may_change=True
    )

    def __post_init__(self) -> None:
        check_fields(self, "guard.")
