"""The latents that `vae cache-latents` wrote, as a data set to train a diffusion model on."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae.checkpoints.found import of_family
from vae.checkpoints.latentshards import DRAWN, FLIPPED, MOMENTS, StoredLatents
from vae.errors import require
from vae.latents import scale_latents, unscale_latents
from vae.models.posterior import DiagonalGaussian


class LatentShards(StoredLatents, Dataset[Tensor]):
    """number -> latents (C, h, w) as float32, as a diffusion model is trained on, or raw ones with `scaled=False`.

    Where posteriors are stored each access draws anew, from torch's global generator; where mirrored images are, half
    of the accesses give one. `family`, "sd" or another, states the scaling factor where what made them did not tell it.
    """

    def __init__(self, folder: str | Path, *, scaled: bool = True, family: str | None = None) -> None:
        super().__init__(folder)
        self.scaled = scaled
        if family is not None:
            raw = not self.are_scaled
            require(raw, f"family={family!r} of scaled latents", "none: they were scaled when they were made")
            self.config = of_family(self.config, family)
        told = scaled == self.are_scaled or self.config.scale_is_known
        require(told, f"{self.folder}: raw latents that do not tell their scale", "family= with them, or scaled=False")

    def __getitem__(self, number: int) -> Tensor:
        mirrors = any(FLIPPED in name for name in self.stored)
        suffix = FLIPPED if mirrors and torch.rand(()).item() < 0.5 else ""
        if f"{MOMENTS[0]}{suffix}" in self.stored:
            mean, logvar = (self.row(number, f"{name}{suffix}")[None] for name in MOMENTS)
            latents = DiagonalGaussian(mean, logvar).sample()
        else:
            latents = self.row(number, f"{DRAWN[0]}{suffix}")[None].float()
        if self.scaled != self.are_scaled:
            latents = (scale_latents if self.scaled else unscale_latents)(latents, self.config)
        return latents[0]
