"""The processes that measure together: started by torchrun, over gloo, which needs no GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

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

    def agree(self, value: str, what: str) -> None:
        """Refuse, in every process, to go on with different things."""
        said = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(said, value)
        if len(set(said)) > 1:
            raise InputError(f"the processes see different {what}: all must read the same files, of the same names")

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def device(self, device: torch.device) -> torch.device:
        """Where there are several GPUs, one of its own for each process of a machine."""
        if device.type != "cuda" or device.index is not None or self.world == 1:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


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
