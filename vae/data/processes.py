"""Which of how many processes this is, how many cores it has, and what its workers heed."""

import os
import signal
from typing import NamedTuple

from vae.errors import require

WORLDS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
MOST_WORKERS = 4  # unless data.workers asks for another number


class Place(NamedTuple):
    """Which of how many processes this is, and which variable of the environment says so."""

    rank: int = 0
    world: int = 1
    said_by: str = ""


def place() -> Place:
    """By the environment; processes need not know each other."""
    for ranks, worlds in WORLDS:
        rank, world = os.environ.get(ranks), os.environ.get(worlds)
        if rank is not None and world is not None:
            numbers = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
            require(numbers, f"{ranks}={rank}, {worlds}={world} in the environment", "a number below the other")
            return Place(int(rank), int(world), worlds)
    return Place()


def workers_for(wanted: int | None) -> int:
    """As many as are wanted, else as there are cores, at most `MOST_WORKERS`."""
    return min(MOST_WORKERS, cores()) if wanted is None else wanted


def cores() -> int:
    """That this process may use, its share where torchrun started several on the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, allowed // (int(beside) if beside.isdecimal() else 1))


def outlive_signals(_: int) -> None:
    """A signal to the group reaches the workers too, but their process may have an update to finish with them.

    So they ignore all but SIGTERM, and that one for ten minutes: an update may be slow. Theirs ends them when it does.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))
