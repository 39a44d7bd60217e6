"""The processes that measure together: started by torchrun, over gloo, which needs no GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vae.data.processes import Place, place
from vae.errors import InputError

PATIENCE = timedelta(days=7)  # one process may have far more to do than another
TORCHRUN = "WORLD_SIZE"
Said = TypeVar("Said")


class Team:
    """This process among the others; alone, it talks to nobody."""

    def __init__(self, here: Place) -> None:
        self.rank, self.world = here.rank, here.world

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def of_first(self, value: Said) -> Said:
        """What the first process says."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def agree(self, plan: dict[str, Any]) -> None:
        """Refuse, in every process, to go on with different things."""
        said = [plan] * self.world
        if self.world > 1:
            dist.all_gather_object(said, plan)
        for other in said:
            if (key := first_difference(other, plan)) is not None:
                raise InputError(f"the processes see different {key}: all must have the same files and versions")

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def device(self, device: torch.device) -> torch.device:
        """Where there are several GPUs, one of its own for each process of a machine."""
        if device.type != "cuda" or device.index is not None or self.world == 1:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def leads_alone() -> bool:
    """Whether this is the first of the processes that trained together; their group, if there is one, is left."""
    if not (dist.is_available() and dist.is_initialized()):
        return place().rank == 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank == 0


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first key under which two plans differ, with the one below it: "library.code"."""
    for key in [*one, *other]:
        a, b = one.get(key), other.get(key)
        if a != b:
            below = first_difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else None
            return key if below is None else f"{key}.{below}"
    return None


@contextmanager
def gathered() -> Iterator[Team]:
    """The team, which is dissolved at the end."""
    here = place()
    if here.said_by != TORCHRUN or here.world == 1:
        yield Team(Place())
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Team(here)
    finally:
        dist.destroy_process_group()
