"""The training objective: raw terms by name, their weights, and one sum.

total = pixel + perceptual + kl + adversarial, each times its weight. The adversarial term is also multiplied by the
adaptive weight and a ramp. Every term is a mean per image element, so a weight means the same at any size of image
and batch.
"""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from vae.config.loss import LossConfig, LossWeights
from vae.losses.reconstruction import PIXEL_LOSSES, kl_per_element
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian


class Objective:
    """(images, reconstructions, posterior) -> {"pixel", "perceptual", "kl"}: raw scalars, only those with a weight.

    This is deliberately not a module: the frozen LPIPS network inside belongs to no optimiser, checkpoint or DDP
    bucket.
    """

    def __init__(self, config: LossConfig) -> None:
        self.weights = config.weights
        self.kl_warmup = config.kl_warmup
        self.pixel = PIXEL_LOSSES[config.pixel]
        self.lpips = None
        if config.weights.perceptual:
            self.lpips = LPIPS(config.perceptual_net, config.perceptual_weights, config.perceptual_channels)

    def to(self, device: torch.device) -> "Objective":
        """Move the LPIPS network to `device` and return the objective itself."""
        if self.lpips is not None:
            self.lpips.to(device)
        return self

    def __call__(self, images: Tensor, reconstructions: Tensor, posterior: DiagonalGaussian) -> dict[str, Tensor]:
        """Return the raw terms that have a weight, as float scalars.

        `images` and `reconstructions` are (B, C, H, W), images in [-1, 1]. The KL term is in nats per image element.
        """
        terms: dict[str, Tensor] = {}
        if self.weights.pixel:
            terms["pixel"] = self.pixel(images, reconstructions)
        if self.lpips is not None:
            terms["perceptual"] = self.lpips(images, reconstructions).mean()
        if self.weights.kl:
            terms["kl"] = kl_per_element(posterior, images)
        return terms


def weighted_sum(terms: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Return the sum of weight * term. Raises KeyError for a term without a weight of its name."""
    names = {term.name for term in fields(weights)}
    unknown = sorted(set(terms) - names)
    if unknown:
        raise KeyError(f"loss terms {unknown} have no weight; known are {sorted(names)}")
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
