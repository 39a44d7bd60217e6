"""How far activations exceed what float16 should have to hold, as something to learn from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vae.audit.activations import observed
from vae.models.interface import Autoencoder


class Excess:
    """By how much the largest activation of each image exceeds `limit`, in limits: mean over images, sum over layers.

    Only of what depends on what learns. An attention's products of queries and keys count before they are scaled down,
    as the original LDM code holds them in memory.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._found: list[Tensor] = []
        self._queries: dict[str, Tensor] = {}

    @property
    def total(self) -> Tensor | None:
        """None where nothing that was seen learns."""
        return torch.stack(self._found).sum() if self._found else None

    def note(self, name: str, output: Tensor) -> None:
        """Of a layer: its output (B, ...), in float32 whatever the layers compute in."""
        with torch.autocast(output.device.type, enabled=False):
            self._add(output.float())
            block, _, projection = name.rpartition(".")
            if projection == "to_q":
                self._queries[block] = output.float()
            elif projection == "to_k":
                self._add(self._queries.pop(block) @ output.float().transpose(-1, -2))

    def _add(self, output: Tensor) -> None:
        if output.requires_grad:
            largest = output.abs().flatten(1).amax(dim=1)
            self._found.append(torch.relu(largest / self.limit - 1.0).mean())


@contextmanager
def excess_of(model: Autoencoder, limit: float) -> Iterator[Excess]:
    """Of everything that goes through `model` within the block; its layers are computed one by one there."""
    excess = Excess(limit)
    with observed(model, excess.note):
        yield excess
