"""What a validation measures: means over all images of all processes, each counted once."""

import torch
import torch.distributed as dist
from torch import Tensor

from vae.data.transforms import to_model_range
from vae.errors import require
from vae.latents import LatentStatistics
from vae.metrics.paired import PairedMetrics
from vae.models.posterior import DiagonalGaussian
from vae.training import ranks
from vae.training.set_metrics import SetMetrics

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
        shares = [(self._sums, self._counts, self.latents)] * ranks.count()
        if ranks.count() > 1:
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
