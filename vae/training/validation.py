"""What a validation measures, over all images of all processes, each counted once.

`SetMetrics` measures rFID and KID, which need all images together. `Validation` measures means over images, and the
statistics of their latents.
"""

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
    """Inception features (2048,) of a validation image and its reconstruction, with the image's place in the order."""

    place: int
    image: np.ndarray
    reconstruction: np.ndarray


class SetMetrics:
    """rFID and KID of all images and all reconstructions together, whichever process saw them.

    Inception features are kept until all images are seen, 16 KB for each image. Without `inception` nothing is
    measured.
    """

    def __init__(self, inception: Inception | None) -> None:
        self.inception = inception
        self.start()

    @classmethod
    def of(cls, config: TrainConfig) -> "SetMetrics":
        """Return the metrics with the Inception weights that are on this machine; none are downloaded.

        Raises InputError if `config` asks for weights, or for a metric that needs them, and they are absent.
        """
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
        """Move Inception to `device`."""
        if self.inception is not None:
            self.inception.to(device)

    def start(self) -> None:
        """Forget the images of the previous validation."""
        self._seen: list[Seen] = []

    def update(self, indices: list[int], images: Tensor, reconstructions: Tensor) -> None:
        """Take in images and reconstructions, both uint8 (B, 3, H, W), by their places in the order."""
        if self.inception is not None:
            both = [self.inception.features(one, CONVENTION).cpu().numpy() for one in (images, reconstructions)]
            self._seen += map(Seen, indices, *both)

    def finish(self) -> dict[str, float]:
        """Return rFID and KID on the first process, and nothing on the others.

        Features are sorted in the order of the images, so the result does not depend on the number of processes.
        """
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
        """Return the features of all processes, on the first process only.

        The result is empty if any process has no Inception weights.
        """
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
            warn("rFID and KID are not measured: not every process has the Inception weights on its machine")
            self.inception = None
        return []


AUDITED = 2  # images that decide whether an export is safe in float16


class Validation:
    """Means of metrics, summed in float64 and merged over the processes when all have seen their share.

    `measured` is what the last validation found and `latents` are the statistics of its latents. `absent` are the
    metrics that its images cannot have, each with the reason.
    """

    def __init__(self, metrics: PairedMetrics, latent_channels: int, sets: SetMetrics) -> None:
        self.metrics = metrics
        self.latent_channels = latent_channels
        self.sets = sets
        self.start()

    def to(self, device: torch.device) -> "Validation":
        """Move the networks of the metrics to `device`, and return the validation itself."""
        self.metrics.to(device)
        self.sets.to(device)
        return self

    def start(self) -> None:
        """Forget the previous validation."""
        self.measured: dict[str, float] = {}
        self.absent: dict[str, str] = {}
        self._first: list[Tensor] = []
        self.sets.start()
        self.latents = LatentStatistics(self.latent_channels)
        self._sums = dict.fromkeys(self.metrics.names, 0.0)
        self._counts = dict.fromkeys(self.metrics.names, 0)

    @property
    def audited(self) -> Tensor:
        """This process's first images, at most AUDITED, (B, C, H, W) in [-1, 1].

        Raises InputError if it could read none.
        """
        require(bool(self._first), "none of this process's validation images can be read", "some: see skipped.jsonl")
        return to_model_range(torch.stack(self._first))

    def update(self, indices: list[int], images: Tensor, reconstructions: Tensor, posterior: DiagonalGaussian) -> None:
        """Take in uint8 images (B, C, H, W), their reconstructions, and the posterior between them.

        A value that is not finite does not count for the mean of its metric.
        """
        self.absent = self.metrics.absent(images)
        self._first += images[: AUDITED - len(self._first)]
        self.latents.update(posterior)
        self.sets.update(indices, images, reconstructions)

        for name, values in self.metrics(images, reconstructions).items():
            finite = values[torch.isfinite(values)].double()
            self._sums[name] += finite.sum().item()
            self._counts[name] += len(finite)

    def finish(self) -> dict[str, float]:
        """Return means by name, the standard deviation of latents, and what each of their channels carries.

        The KL of a channel is in nats. Only the first process has the metrics of all images together. Raises
        InputError if no image could be read.
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
