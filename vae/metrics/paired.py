"""The metrics of one image against its reconstruction, by name."""

import torch
from torch import Tensor

from vae.errors import InputError
from vae.metrics.psnr import psnr
from vae.metrics.ssim import ssim
from vae.models.backbones import BACKBONES
from vae.models.features import MissingBackboneError
from vae.models.lpips import LPIPS

PAIRED_METRICS = ("psnr", "ssim", *(f"lpips_{net}" for net in sorted(BACKBONES)))
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips_alex": False, "lpips_vgg": False}


class PairedMetrics:
    """(images, reconstructions), uint8 (B, C, H, W) -> {name: (B,) float64}.

    A metric whose weights are missing is left out; `missing` says why and what to do. `shared` is an LPIPS network that
    serves here too, for the metric of its net.
    """

    def __init__(self, names: tuple[str, ...] = PAIRED_METRICS, shared: LPIPS | None = None) -> None:
        unknown = sorted(set(names) - set(PAIRED_METRICS))
        if unknown:
            raise InputError(f"unknown metrics {unknown}, expected some of {list(PAIRED_METRICS)}")
        self.names = names
        self.missing: dict[str, str] = {}
        self.lpips: dict[str, LPIPS] = {}
        for name in names:
            if name.startswith("lpips_"):
                net = name.removeprefix("lpips_")
                try:
                    self.lpips[name] = shared if shared is not None and shared.net == net else LPIPS(net)
                except MissingBackboneError as error:
                    self.missing[name] = str(error)

    def to(self, device: torch.device) -> "PairedMetrics":
        for net in self.lpips.values():
            net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        assert images.dtype == reconstructions.dtype == torch.uint8
        rows: dict[str, Tensor] = {}
        if "psnr" in self.names:
            rows["psnr"] = psnr(images, reconstructions)
        if "ssim" in self.names:
            rows["ssim"] = ssim(images, reconstructions)
        for name, net in self.lpips.items():
            rows[name] = net(_to_signed(images), _to_signed(reconstructions)).double()
        return rows


def _to_signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0
