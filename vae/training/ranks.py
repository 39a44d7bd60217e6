"""What the processes of a run share besides gradients."""

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Said = TypeVar("Said")


def count() -> int:
    """Processes that train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Without a gradient, on the tensor's device."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / count()


class Council:
    """Decisions that all processes must take alike. Over the CPU: no GPU waits for them."""

    def __init__(self) -> None:
        self._group: Any = None

    def convene(self, timeout: timedelta) -> None:
        """To be called by all processes at once, when they know each other."""
        if count() > 1:
            self._group = dist.new_group(timeout=timeout, backend="gloo")

    def highest(self, value: int) -> int:
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)
        return int(tensor)

    def all_of(self, mine: Said) -> list[Said]:
        said = [mine] * count()
        if self._group is not None:
            dist.all_gather_object(said, mine, self._group)
        return said
