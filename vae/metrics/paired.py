"""The paired metrics: one image against its reconstruction, each metric by its name."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from vae.errors import InputError
from vae.metrics.pixel import appearance, l1, psnr
from vae.metrics.registry import OF_SETS, PAIRED
from vae.metrics.ssim import LEAST_SIDE, WINDOW, ms_ssim, ssim
from vae.models.arithmetic import float32_arithmetic
from vae.models.lpips import LPIPS, MissingBackboneError

OF_PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "l1": l1}
OF_COLOUR = {"colour_shift", "saturation"}
OF_APPEARANCE = {*OF_COLOUR, "contrast", "sharpness", "high_frequency"}
LEAST_SIDES = {
    "ssim": WINDOW,
    "ms_ssim": LEAST_SIDE,
    "lpips_alex": 31,  # the last features of a smaller image are empty
    "lpips_vgg": 16,
} | dict.fromkeys(OF_APPEARANCE, 5)


class PairedMetrics:
    """Images and reconstructions, uint8 (B, C, H, W) -> {name: (B,) float64}.

    NaN means "not applicable" to this image. A metric whose weights are missing is skipped, and `missing` says why and
    what to do. One that is `unavailable` for such images is skipped too. `shared` is an LPIPS network that is used for
    the metric of its net as well.
    """

    def __init__(
        self, names: tuple[str, ...] = tuple(PAIRED), shared: LPIPS | None = None, *, download: bool = True
    ) -> None:
        unknown = sorted(set(names) - set(PAIRED))
        if unknown:
            raise InputError(f"unknown metrics {unknown}, expected some of {list(PAIRED)}")

        self.names = names
        self.missing: dict[str, str] = {}
        self.lpips: dict[str, LPIPS] = {}

        for name in names:
            if name.startswith("lpips_"):
                net = name.removeprefix("lpips_")
                try:
                    known = shared if shared is not None and shared.net == net else None
                    self.lpips[name] = known or LPIPS(net, download=download)
                except MissingBackboneError as error:
                    self.missing[name] = str(error)

    def to(self, device: torch.device) -> "PairedMetrics":
        """Move the LPIPS networks to `device`."""
        for net in self.lpips.values():
            net.to(device)
        return self

    @torch.no_grad()
    @float32_arithmetic()
    def __call__(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Measure two batches uint8 (B, C, H, W): {metric: (B,) float64}.

        A metric that is not available for such images is absent.
        """
        assert images.dtype == reconstructions.dtype == torch.uint8

        absent = self.absent(images)
        names = [name for name in self.names if name not in absent]

        looks = appearance(images, reconstructions) if OF_APPEARANCE & set(names) else {}
        rows: dict[str, Tensor] = {}
        for name in names:
            if name in OF_PIXELS:
                rows[name] = OF_PIXELS[name](images, reconstructions)
            elif name in self.lpips:
                rows[name] = self.lpips[name](_to_signed(images), _to_signed(reconstructions)).double()
            else:
                rows[name] = looks[name]

        return rows

    def absent(self, images: Tensor) -> dict[str, str]:
        """Return {name: why} of the metrics that images (B, C, H, W) like these do not get here."""
        channels = images.shape[1]
        side = min(images.shape[-2:])
        seeing = [name for name, network in self.lpips.items() if network.sees(channels)]
        return self.missing | unavailable(self.names, channels, side, seeing)


def unavailable(names: Iterable[str], channels: int, resolution: int, seeing: Collection[str] = ()) -> dict[str, str]:
    """Return {name: why} of the metrics that images of `channels` channels and `resolution` pixels a side cannot have.

    The metrics may be paired or of sets. `seeing` are those whose networks have been given the channels to see.
    """
    reasons: dict[str, str] = {}

    for name in names:
        least = LEAST_SIDES.get(name, 1)
        if resolution < least:
            reasons[name] = f"needs images of {least} pixels a side or more; these have {resolution}"

        if name.startswith("lpips_") and channels == 2 and name not in seeing:
            reasons[name] = "ImageNet's networks see grey, RGB, RGBA, or three of more channels; these have 2"

        if name in OF_SETS and channels != 3:
            reasons[name] = f"Inception sees RGB images; these have {channels} channels"

        if name in OF_APPEARANCE and channels not in (1, 3, 4):
            reasons[name] = f"how an image looks is known of grey, RGB and RGBA; these have {channels} channels"
        if name in OF_COLOUR and channels == 1:
            reasons[name] = "grey images have no colour"

    return reasons


def _to_signed(images: Tensor) -> Tensor:
    """Map uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0
