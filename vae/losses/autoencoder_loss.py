"""The training objective: what each term measures, their weights, and one sum.

total = the sum of all terms, each times its weight: pixel, perceptual and further terms of RECONSTRUCTION_TERMS, the KL
term, and the adversarial term. That one is in vae/losses/adversarial.py; it is also multiplied by the adaptive weight
and a ramp. A term does not depend on the size of image or batch, so a weight means the same everywhere. Images are in
[-1, 1], float32 outside autocast; reconstructions are not clamped.

A new term is a function with its entry in RECONSTRUCTION_TERMS or POSTERIOR_TERMS, and a weight of its name in
LossWeights.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn

from vae.config.loss import LossConfig, LossWeights
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian

CHARBONNIER_EPS = 1e-3


def l1_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean absolute difference per element."""
    return (images - reconstructions).abs().mean()


def l2_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean squared difference per element."""
    return (images - reconstructions).square().mean()


def charbonnier_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2) - eps: L1 with a smooth minimum (Charbonnier et al., 1994)."""
    return ((images - reconstructions).square() + CHARBONNIER_EPS**2).sqrt().mean() - CHARBONNIER_EPS


PIXEL_LOSSES = {"l1": l1_loss, "l2": l2_loss, "charbonnier": charbonnier_loss}


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """Return KL(q || N(0, I)) in nats per *image* element (of C * H * W), mean over the batch.

    It is divided like the pixel term, so that a weight of 1e-6 means what it means in LDM, which sums both over the
    image.
    """
    return posterior.kl().mean() / images[0].numel()


def latent_distance(posterior: DiagonalGaussian, target: DiagonalGaussian) -> Tensor:
    """Return the squared 2-Wasserstein distance of the two posteriors, mean over all latent elements.

    For Gaussians with diagonal covariance it is |m1 - m2|^2 + |s1 - s2|^2 (Dowson and Landau, "The Frechet distance
    between multivariate normal distributions", 1982). Unlike the KL divergence it has no singularity at a target of
    zero width.
    """
    return ((posterior.mean - target.mean).square() + (posterior.std - target.std).square()).mean()


def lpips_of(config: LossConfig) -> LPIPS:
    """Build the frozen network that LPIPS compares the features of."""
    return LPIPS(config.perceptual_net, config.perceptual_weights, config.perceptual_channels)


# {name: a function that is called once with the config, and returns the term}. The term takes (images, reconstructions)
# and returns a scalar, or a value for each image, of which the objective takes the mean.
RECONSTRUCTION_TERMS: dict[str, Callable[[LossConfig], Callable[[Tensor, Tensor], Tensor]]] = {
    "pixel": lambda config: PIXEL_LOSSES[config.pixel],
    "perceptual": lpips_of,
}
POSTERIOR_TERMS: dict[str, Callable[[DiagonalGaussian, Tensor], Tensor]] = {"kl": kl_per_element}


class Objective:
    """The terms of the autoencoder's loss that have a weight. Every term is raw: its weight comes in at the sum.

    This is deliberately not a module: the frozen networks inside belong to no optimiser, checkpoint or DDP bucket.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = config.weights
        self.image_terms = {
            name: build(config) for name, build in RECONSTRUCTION_TERMS.items() if getattr(config.weights, name)
        }

    @property
    def lpips(self) -> LPIPS | None:
        """The network of the perceptual term, or None where that term has no weight."""
        return cast("LPIPS | None", self.image_terms.get("perceptual"))

    def to(self, device: torch.device) -> "Objective":
        """Move the frozen networks to `device` and return the objective itself."""
        for term in self.image_terms.values():
            if isinstance(term, nn.Module):
                term.to(device)
        return self

    def of_images(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Return the raw terms of reconstructions as float scalars. Both are (B, C, H, W), images in [-1, 1]."""
        return {name: term(images, reconstructions).mean() for name, term in self.image_terms.items()}

    def of_posterior(self, posterior: DiagonalGaussian, images: Tensor) -> dict[str, Tensor]:
        """Return the raw terms of the posterior of `images` as float scalars. KL is in nats per image element."""
        return {name: term(posterior, images) for name, term in POSTERIOR_TERMS.items() if getattr(self.weights, name)}

    def weighted_sum(self, terms: Mapping[str, Tensor], updates: int) -> Tensor:
        """Return the sum of weight * term; zero where there are no terms. The KL term is warmed up.

        `updates` is the clock. Raises KeyError for a term without a weight of its name.
        """
        if not terms:
            return torch.zeros(())
        unknown = terms.keys() - {one.name for one in fields(LossWeights)}
        if unknown:
            raise KeyError(f"loss terms {sorted(unknown)} have no weight in LossWeights")

        weighted = [getattr(self.weights, name) * (_risen(name, self.config, updates) * t) for name, t in terms.items()]
        return torch.stack(weighted).sum()


def total(logs: Mapping[str, Tensor], config: LossConfig, updates: int) -> Tensor:
    """Return the weighted sum of the raw terms in `logs`, as the autoencoder's gradient has it. It has no gradient."""
    balance = {"adversarial": logs.get("adaptive_weight", 1.0)}
    weights = {one.name: getattr(config.weights, one.name) for one in fields(LossWeights) if one.name in logs}
    parts = [
        weight * _risen(name, config, updates) * balance.get(name, 1.0) * logs[name].detach()
        for name, weight in weights.items()
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _risen(term: str, config: LossConfig, updates: int) -> float:
    """Return the share of its full weight, 0 to 1, that a term has at this update."""
    if term == "kl":
        return ramp(updates, 0, config.kl_warmup)
    if term == "adversarial":
        return ramp(updates, config.adversarial_start, config.adversarial_ramp)
    return 1.0


def ramp(updates: int, start: int, length: int) -> float:
    """Return 0 before update `start`, then rise linearly to 1 within `length` updates (at once if `length` is 0)."""
    if updates < start:
        return 0.0
    return min(1.0, (updates - start + 1) / length) if length else 1.0
