"""rFID and KID of a validation: of all images and all reconstructions together, whichever process saw them."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vae.config import VALIDATED_SETS, TrainConfig
from vae.errors import InputError
from vae.metrics.frechet import frechet_distance
from vae.metrics.kernel import kernel_distance
from vae.metrics.registry import CONVENTION_OF
from vae.models.features import MissingBackboneError
from vae.models.inception import Inception, load_inception
from vae.models.inception_weights import FILES
from vae.training import ranks
from vae.training.console import warn

ABSENT = f"no rFID and KID at validation: {FILES[0]} is not in torch hub's folder; inception=PATH names it elsewhere"
CONVENTION = CONVENTION_OF["rfid"]
MOST_FOR_KID = 5_000  # images: training waits, and the time grows with their square


class Seen(NamedTuple):
    """Features (2048,) of a validation image and of its reconstruction."""

    place: int
    image: np.ndarray
    reconstruction: np.ndarray


class SetMetrics:
    """Keeps Inception features until all images are seen, 16 KB for each. Without `inception` nothing is measured."""

    def __init__(self, inception: Inception | None) -> None:
        self.inception = inception
        self.start()

    @classmethod
    def of(cls, config: TrainConfig) -> "SetMetrics":
        """With the weights that are on this machine; none is fetched. What `config` asks for must be there."""
        if config.model.out_channels != 3:
            return cls(None)
        try:
            return cls(load_inception(config.inception))
        except MissingBackboneError as error:
            if config.inception is not None or config.best_metric in VALIDATED_SETS:
                given = f"inception={config.inception!r} and keep_best={config.keep_best!r}"
                raise InputError(f"{given}: {error}") from error
            return cls(None)

    def to(self, device: torch.device) -> None:
        if self.inception is not None:
            self.inception.to(device)

    def start(self) -> None:
        self._seen: list[Seen] = []

    def update(self, indices: list[int], images: Tensor, reconstructions: Tensor) -> None:
        """uint8 (B, 3, H, W) twice."""
        if self.inception is not None:
            both = [self.inception.features(one, CONVENTION).cpu().numpy() for one in (images, reconstructions)]
            self._seen += map(Seen, indices, *both)

    def finish(self) -> dict[str, float]:
        """In the order of the images, so that the number of processes decides nothing. Empty but in the first one."""
        shares = self._shares()
        if not shares:
            return {}
        seen = sorted((one for share in shares for one in share), key=lambda one: one.place)
        if len(seen) < 2:
            return {}
        images, reconstructions = np.stack([one.image for one in seen]), np.stack([one.reconstruction for one in seen])
        return {
            "rfid": frechet_distance(images, reconstructions),
            "kid": kernel_distance(images[:MOST_FOR_KID], reconstructions[:MOST_FOR_KID]),
        }

    def _shares(self) -> list[list[Seen]]:
        """Of all processes, for the first one; nothing where one of them is without weights."""
        mine = None if self.inception is None else self._seen
        shares: list[list[Seen] | None] = [mine]
        if ranks.count() > 1:
            is_first = dist.get_rank() == 0
            shares *= ranks.count()
            dist.gather_object(mine, shares if is_first else None)
            if not is_first:
                return []
        whole = [share for share in shares if share is not None]
        if len(whole) == len(shares):
            return whole
        if self.inception is not None:
            warn("warning: rFID and KID are not measured: not every process has the Inception weights on its machine")
            self.inception = None
        return []
