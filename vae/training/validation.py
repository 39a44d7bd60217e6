"""rFID and KID of a validation: of all images and all reconstructions together, whichever process saw them.

What a validation measures: means over all images of all processes, each counted once."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vae import distributed
from vae.config.schema import VALIDATED_SETS, TrainConfig
from vae.console import warn
from vae.data.transforms import to_model_range
from vae.errors import InputError, require
from vae.latents import LatentStatistics
from vae.metrics.paired import PairedMetrics
from vae.metrics.registry import CONVENTION_OF
from vae.metrics.set_distances import frechet_distance, kernel_distance
from vae.models.inception import FILES, Inception, load_inception
from vae.models.lpips import MissingBackboneError
from vae.models.posterior import DiagonalGaussian

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
        if distributed.world_size() > 1:
            is_first = dist.get_rank() == 0
            shares *= distributed.world_size()
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


AUDITED = 2  # images that decide whether an export is safe in float16


class Validation:
    """Sums in float64, merged over the processes when all have seen their share.

    `measured` is what the last one found, `latents` what lay between, `absent` the metrics that its images cannot have,
    each with the reason.
    """

    def __init__(self, metrics: PairedMetrics, latent_channels: int, sets: SetMetrics) -> None:
        self.metrics, self.latent_channels, self.sets = metrics, latent_channels, sets
        self.start()

    def to(self, device: torch.device) -> "Validation":
        self.metrics.to(device)
        self.sets.to(device)
        return self

    def start(self) -> None:
        self.measured: dict[str, float] = {}
        self.absent: dict[str, str] = {}
        self._first: list[Tensor] = []
        self.sets.start()
        self.latents = LatentStatistics(self.latent_channels)
        self._sums = dict.fromkeys(self.metrics.names, 0.0)
        self._counts = dict.fromkeys(self.metrics.names, 0)

    @property
    def audited(self) -> Tensor:
        """This process's first images, at most AUDITED, in [-1, 1]."""
        require(bool(self._first), "none of this process's validation images can be read", "some: see skipped.jsonl")
        return to_model_range(torch.stack(self._first))

    def update(self, indices: list[int], images: Tensor, reconstructions: Tensor, posterior: DiagonalGaussian) -> None:
        """uint8 images (B, C, H, W), their reconstructions, and what lay between. Infinite values are not counted."""
        self.absent = self.metrics.absent(images)
        self._first += images[: AUDITED - len(self._first)]
        self.latents.update(posterior)
        self.sets.update(indices, images, reconstructions)
        for name, values in self.metrics(images, reconstructions).items():
            finite = values[torch.isfinite(values)].double()
            self._sums[name] += finite.sum().item()
            self._counts[name] += len(finite)

    def finish(self) -> dict[str, float]:
        """Means by name, the latents' standard deviation, and what each of their channels carries.

        What is measured of all images together the first process alone has.
        """
        shares = [(self._sums, self._counts, self.latents)] * distributed.world_size()
        if distributed.world_size() > 1:
            dist.all_gather_object(shares, shares[0])
        self.latents = LatentStatistics(self.latent_channels)
        for _, _, latents in shares:
            self.latents.merge(latents)
        require(self.latents.count > 0, "none of the validation images can be read", "some: skipped.jsonl lists them")
        measured = self.sets.finish()
        for name in self.metrics.names:
            count = sum(counts[name] for _, counts, _ in shares)
            measured[name] = sum(sums[name] for sums, _, _ in shares) / count if count else float("nan")
        measured |= {"latent_std": self.latents.std, "active_channels": float(self.latents.channel_is_active.sum())}
        kl = self.latents.channel_kl.tolist() if self.latents.has_width else []
        measured |= {f"kl_{channel}": nats for channel, nats in enumerate(kl)}
        self.measured = measured
        return measured
