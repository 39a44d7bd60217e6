"""What a protocol is: how numbers are made, named, versioned and hashed, so that two tables can be told apart."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae.data.order import seed_for
from vae.errors import require
from vae.evaluation.pixels import Sees
from vae.metrics.psnr import psnr
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian


@dataclass(frozen=True)
class Protocol:
    """Every choice that moves a metric: `choices` in words, hashed, and below them what does as they say.

    `version` changes whenever the arithmetic behind one of the words does. `cut` is (pixels (C, H, W), size) ->
    float32 (C, size, size) in [-1, 1], and runs in the workers of a loader.
    """

    name: str
    version: int
    choices: Mapping[str, str]
    cut: Callable[[Tensor, int], Tensor]
    quantise: Callable[[Tensor], Tensor]
    psnr_sees: Sees
    ssim_sees: Sees
    ssim: Callable[[Tensor, Tensor, float], Tensor]
    lpips_sees: Callable[[Tensor], Tensor]
    is_sampled: bool = False
    is_for_rgb: bool = True

    @property
    def sha256(self) -> str:
        hashed = {"name": self.name, "version": self.version, **self.choices}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        listed = "\n".join(f"  {key:<12} {value}" for key, value in self.choices.items())
        return f"protocol {self.name}, version {self.version}, sha256 {self.sha256}\n{listed}"

    def described(self) -> dict[str, Any]:
        """What is stored beside the numbers."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256, "choices": dict(self.choices)}

    def check(self, channels: int, bits: int) -> None:
        """Refuse images that are not of the kind it is defined for."""
        given = f"protocol={self.name} with images of {channels} channels and {bits} bits"
        fits = not self.is_for_rgb or (channels, bits) == (3, 8)
        require(fits, given, "3 channels and 8 bits, as its authors have; or protocol=default-v1")

    def latents_of(self, posterior: DiagonalGaussian, indices: Sequence[int], seed: int) -> Tensor:
        """What is decoded: the mode, or a sample whose noise is a function of `seed` and the image's index alone."""
        if not self.is_sampled:
            return posterior.mode()
        shape = posterior.mean.shape[1:]
        draws = [torch.Generator().manual_seed(seed_for(seed, index)) for index in indices]
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        return posterior.reparameterize(noise.to(posterior.mean))

    @torch.no_grad()
    def measure(
        self,
        images: Tensor,
        reconstructions: Tensor,
        lpips: Mapping[str, LPIPS],
        names: Collection[str] = ("psnr", "ssim"),
    ) -> dict[str, Tensor]:
        """Of floats (B, C, H, W) in [-1, 1], reconstructions not clamped yet: {name: (B,) float64}.

        PSNR and SSIM where `names` has them, and the distance of each of the networks, {"lpips_alex": ...}.
        """
        rows: dict[str, Tensor] = {}
        if "psnr" in names:
            rows["psnr"] = psnr(*self.psnr_sees(images, reconstructions))
        if "ssim" in names:
            rows["ssim"] = self.ssim(*self.ssim_sees(images, reconstructions))
        for name, network in lpips.items():
            rows[name] = network(self.lpips_sees(images), self.lpips_sees(reconstructions)).double()
        return rows

    def quantised(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 twice, what every other metric sees."""
        return self.quantise(images), self.quantise(reconstructions)
