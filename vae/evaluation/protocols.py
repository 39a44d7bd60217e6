"""Evaluation protocols: how images are prepared and PSNR, SSIM and LPIPS computed, named, versioned and hashed.

The hash tells two tables apart that were made in different ways. `PROTOCOLS` has ours, for any channels of 8 or 16
bits, and those that reproduce the tables of other authors, for 8-bit RGB. The latter were read from each author's
evaluation script and are tested against the libraries that the script calls. docs/evaluation.md lists what the scripts
do beyond arithmetic, such as counting images twice, which is not reproduced.

A protocol consists of small functions. A cut makes squares from pixels: (C, H, W), size -> float32 (C, size, size) in
[-1, 1]. Others turn floats in [-1, 1] into what a metric sees: (B, C, H, W) -> the same shape. The three ways of
rounding differ where a value lies half-way between two grey levels, to within the precision of the arithmetic.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vae.data.sampler import seed_for
from vae.data.transforms import center_crop, to_model_range, to_uint8
from vae.errors import require
from vae.metrics.pixel import psnr
from vae.metrics.ssim import padded_ssim, ssim, uniform_ssim
from vae.models.lpips import LPIPS
from vae.models.posterior import DiagonalGaussian


class MetricInput(NamedTuple):
    """How images in [-1, 1] are changed for a metric, and `peak`, the distance between black and white there."""

    change: Callable[[Tensor], Tensor]
    peak: float

    def __call__(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return both images as the metric sees them, and the peak."""
        return self.change(images), self.change(reconstructions), self.peak


def rounded(x: Tensor) -> Tensor:
    """Round to uint8, as our reconstructions are written to files."""
    return to_uint8(x)


def rounded_to_signed(x: Tensor) -> Tensor:
    """Round to the grey levels of `rounded`, as floats in [-1, 1]."""
    return to_model_range(rounded(x))


def rounded_by_lightningdit(x: Tensor) -> Tensor:
    """Round to uint8 with LightningDiT's arithmetic."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8)


def rounded_by_dc_ae(x: Tensor) -> Tensor:
    """Round to uint8 with DC-AE's arithmetic."""
    return (255.0 * ((x + 1.0) / 2.0) + 0.5).clamp(0, 255).to(torch.uint8)


def rounded_by_dc_ae_to_signed(x: Tensor) -> Tensor:
    """Round to the grey levels of `rounded_by_dc_ae`, as floats in [-1, 1]."""
    return 2.0 * (rounded_by_dc_ae(x) / 255.0) - 1.0


def truncated(x: Tensor) -> Tensor:
    """Truncate to uint8.

    Many grey levels of an image itself get darker by one, because the way to [-1, 1] and back rounds.
    """
    return (to_unit(x) * 255.0).to(torch.uint8)


def truncated_to_unit(x: Tensor) -> Tensor:
    """Truncate to the grey levels of `truncated`, as floats in [0, 1]."""
    return truncated(x) / 255.0


def truncated_to_signed(x: Tensor) -> Tensor:
    """Truncate to the grey levels of `truncated`, as floats in [-1, 1]."""
    return to_model_range(truncated(x))


def to_unit(x: Tensor) -> Tensor:
    """Map to [0, 1], clamped."""
    return ((x + 1.0) / 2.0).clamp(0.0, 1.0)


def clamped(x: Tensor) -> Tensor:
    """Clamp to [-1, 1]."""
    return x.clamp(-1.0, 1.0)


def as_decoded(x: Tensor) -> Tensor:
    """Return the floats unchanged; a decoder's output may lie beyond [-1, 1]."""
    return x


BILINEAR = InterpolationMode.BILINEAR


def pillow_bicubic(pixels: Tensor, size: int) -> Tensor:
    """Cut a square with `vae.data.transforms.center_crop`: Pillow's bicubic filter, antialiased; 8 or 16 bits."""
    return to_model_range(center_crop(pixels, size))


def lavinal712(pixels: Tensor, size: int) -> Tensor:
    """Cut a square as lavinal712's script does: Pillow's bilinear filter, antialiased."""
    return _normalised(_pillow_bilinear(pixels, size).float().div(255.0))


def lightningdit(pixels: Tensor, size: int) -> Tensor:
    """Cut a square as LightningDiT's script does: resized as floats, which are not rounded again."""
    resized = TF.resize(pixels.float().div(255.0), [size], BILINEAR, antialias=True)
    return _normalised(TF.center_crop(resized, [size, size]))


def dc_ae(pixels: Tensor, size: int) -> Tensor:
    """Cut a square as DC-AE's script does, by guided-diffusion's crop: box halving while possible, then bicubic."""
    image = TF.to_pil_image(pixels)
    if image.size == (size, size):
        return _normalised(pixels.float().div(255.0))

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)

    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _normalised(_middle(TF.pil_to_tensor(image), size).float().div(255.0))


def seed_voken(pixels: Tensor, size: int) -> Tensor:
    """Cut a square as SEED-Voken's script does: Pillow's bilinear filter, antialiased."""
    return _signed(_pillow_bilinear(pixels, size))


def ldm(pixels: Tensor, size: int) -> Tensor:
    """Cut a square as LDM's script does: SmallestMaxSize and CenterCrop of albumentations.

    These use OpenCV's bilinear filter, which does not antialias.
    """
    height, width = pixels.shape[1:]
    scale = size / min(height, width)
    return _signed(_middle(_opencv_bilinear(pixels, round(height * scale), round(width * scale)), size))


def _pillow_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Resize the short side to `size` with Pillow and crop the centre; uint8 (C, size, size)."""
    image = TF.resize(TF.to_pil_image(pixels), [size], BILINEAR)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


def _opencv_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 exactly as OpenCV 4 and 5 do, bit for bit.

    OpenCV uses weights of 11 bits and truncates twice between its two passes.
    """
    left, right, a, b = _neighbours(pixels.shape[2], width)
    rows = (pixels[:, :, left] * a + pixels[:, :, right] * b) >> 4

    top, bottom, a, b = _neighbours(pixels.shape[1], height)
    sums = ((rows[:, top] * a[:, None]) >> 16) + ((rows[:, bottom] * b[:, None]) >> 16)
    return ((sums + 2) >> 2).clamp(0, 255).byte()


def _neighbours(given: int, wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the two source pixels of each resized pixel, and their weights in 1/2048.

    `given` and `wanted` are the sizes before and after; all four results are (wanted,).
    """
    places = ((torch.arange(wanted).double() + 0.5) * (given / wanted) - 0.5).float()
    first = places.floor()
    share = places - first
    weights = [(2048 * part).round().int() for part in (1.0 - share, share)]
    before, behind = ((first.long() + step).clamp(0, given - 1) for step in (0, 1))

    return before, behind, weights[0], weights[1]


def _middle(pixels: Tensor, size: int) -> Tensor:
    """Crop the central square."""
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _normalised(values: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1], in the order of torchvision's Normalize."""
    return values.sub(0.5).div(0.5)


def _signed(pixels: Tensor) -> Tensor:
    """Map [0, 255] to [-1, 1], in float64 and then rounded to float32, as numpy does it."""
    return pixels.double().div(127.5).sub(1.0).to(torch.float32)


@dataclass(frozen=True)
class Protocol:
    """Every choice that changes a metric: `choices` says it in words, and the other fields carry it out.

    The words are hashed, and `version` changes whenever the arithmetic behind them does. `cut` is (pixels (C, H, W),
    size) -> float32 (C, size, size) in [-1, 1], and runs in the workers of a data loader.
    """

    name: str
    version: int
    choices: Mapping[str, str]
    cut: Callable[[Tensor, int], Tensor]
    quantise: Callable[[Tensor], Tensor]
    psnr_sees: MetricInput
    ssim_sees: MetricInput
    ssim: Callable[[Tensor, Tensor, float], Tensor]
    lpips_sees: Callable[[Tensor], Tensor]
    is_sampled: bool = False
    is_for_rgb: bool = True

    @property
    def sha256(self) -> str:
        """The first 12 digits of the hash of name, version and choices."""
        hashed = {"name": self.name, "version": self.version, **self.choices}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        """Return name, version, hash and choices, a line for each choice."""
        listed = "\n".join(f"  {key:<12} {value}" for key, value in self.choices.items())
        return f"protocol {self.name}, version {self.version}, sha256 {self.sha256}\n{listed}"

    def described(self) -> dict[str, Any]:
        """Return the description that is stored beside the numbers."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256, "choices": dict(self.choices)}

    def check(self, channels: int, bits: int) -> None:
        """Raise InputError unless the protocol is defined for images of this kind."""
        given = f"protocol={self.name} with images of {channels} channels and {bits} bits"
        fits = not self.is_for_rgb or (channels, bits) == (3, 8)
        require(fits, given, "3 channels and 8 bits, as its authors have; or protocol=default-v1")

    def latents_of(self, posterior: DiagonalGaussian, indices: Sequence[int], seed: int) -> Tensor:
        """Return the latents to decode: the mode of the posterior, or a sample of it.

        The noise of a sample depends only on `seed` and on the image's index.
        """
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
        """Measure reconstructions, not yet clamped, against images (B, C, H, W) in [-1, 1].

        Returns {name: (B,) float64}: PSNR and SSIM if `names` has them, and LPIPS with each of the networks,
        {"lpips_alex": ...}.
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
        """Return images and reconstructions as uint8, which is what every other metric sees."""
        return self.quantise(images), self.quantise(reconstructions)


SQUARE = "central square"
SAMPLE = "posterior sample, its noise a function of the seed and the image's index"
PRECISION = "float32, TF32 off (the authors' convolutions: as PyTorch decides)"
MEAN = "mean over images, infinities counted and left out"

DEFAULT_V1 = Protocol(
    name="default-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bicubic, antialiased",
        "crop": "central square",
        "latents": "posterior mode",
        "arithmetic": "float32, TF32 off",
        "quantisation": "clamp to [-1, 1], round to uint8; every metric is of the uint8 images",
        "psnr": "per image over R, G and B, peak 255; mean over images, infinities counted and left out",
        "ssim": "Wang 2004: 11x11 Gaussian, sigma 1.5, inside the image, population covariance, mean of the channels",
        "lpips": "version 0.1, ImageNet features of AlexNet (lpips_alex) and VGG16 (lpips_vgg), images in [-1, 1]",
    },
    cut=pillow_bicubic,
    quantise=rounded,
    psnr_sees=MetricInput(rounded, 255.0),
    ssim_sees=MetricInput(rounded, 255.0),
    ssim=ssim,
    lpips_sees=rounded_to_signed,
    is_for_rgb=False,
)

LAVINAL712_V1 = Protocol(
    name="lavinal712-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bilinear, antialiased",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "PSNR and SSIM of floats clamped to [0, 1]; others but LPIPS of both truncated to uint8",
        "psnr": f"per image over R, G and B, of floats, peak 1; {MEAN}",
        "ssim": "scikit-image's default: flat 7x7 window inside the image, sample covariance; of floats, range 1",
        "lpips": "version 0.1, floats, reconstructions not clamped; the authors report lpips_vgg",
    },
    cut=lavinal712,
    quantise=truncated,
    psnr_sees=MetricInput(to_unit, 1.0),
    ssim_sees=MetricInput(to_unit, 1.0),
    ssim=uniform_ssim,
    lpips_sees=as_decoded,
    is_sampled=True,
)

LIGHTNINGDIT_V1 = Protocol(
    name="lightningdit-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, torchvision bilinear of floats, antialiased (torchvision >= 0.17)",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "clamp, round to uint8 for PSNR and others; SSIM of clamped floats, LPIPS of floats",
        "psnr": f"per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "torchmetrics: 11x11 Gaussian over mirrored borders; of [-1, 1], range 2, where it is not Wang's SSIM",
        "lpips": "version 0.1, floats, reconstructions not clamped; the authors report lpips_vgg",
    },
    cut=lightningdit,
    quantise=rounded_by_lightningdit,
    psnr_sees=MetricInput(rounded_by_lightningdit, 255.0),
    ssim_sees=MetricInput(clamped, 2.0),
    ssim=padded_ssim,
    lpips_sees=as_decoded,
    is_sampled=True,
)

DC_AE_V1 = Protocol(
    name="dc-ae-v1",
    version=1,
    choices={
        "resize": "halved by PIL box while at least twice the resolution, then PIL bicubic (guided-diffusion)",
        "crop": SQUARE,
        "latents": "posterior mode (the authors' model has no posterior)",
        "arithmetic": PRECISION,
        "quantisation": "clamp, round to uint8; every metric is of the uint8 images",
        "psnr": f"per image over R, G and B, peak 255; {MEAN}",
        "ssim": "torchmetrics: 11x11 Gaussian over mirrored borders, population covariance, range 255",
        "lpips": "version 0.1, of the uint8 images; the authors report lpips_alex",
    },
    cut=dc_ae,
    quantise=rounded_by_dc_ae,
    psnr_sees=MetricInput(rounded_by_dc_ae, 255.0),
    ssim_sees=MetricInput(rounded_by_dc_ae, 255.0),
    ssim=padded_ssim,
    lpips_sees=rounded_by_dc_ae_to_signed,
)

SEED_VOKEN_V1 = Protocol(
    name="seed-voken-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bilinear, antialiased",
        "crop": SQUARE,
        "latents": "posterior mode (the authors' models choose from a codebook)",
        "arithmetic": PRECISION,
        "quantisation": "clamp, truncate both to uint8 for PSNR, SSIM and others; LPIPS of clamped floats",
        "psnr": f"per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "scikit-image's default: flat 7x7 window inside the image, sample covariance; of uint8",
        "lpips": "version 0.1, clamped floats; the authors report both",
    },
    cut=seed_voken,
    quantise=truncated,
    psnr_sees=MetricInput(truncated_to_unit, 1.0),
    ssim_sees=MetricInput(truncated_to_unit, 1.0),
    ssim=uniform_ssim,
    lpips_sees=clamped,
)

LDM_V1 = Protocol(
    name="ldm-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, OpenCV bilinear, not antialiased",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "not published; here clamp, truncate both to uint8, as the authors' scripts write pictures",
        "psnr": f"not published; here per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "none in the authors' tables; here that of default-v1",
        "lpips": "the authors' PSIM is not published and not this; here version 0.1, of the uint8 images",
    },
    cut=ldm,
    quantise=truncated,
    psnr_sees=MetricInput(truncated, 255.0),
    ssim_sees=MetricInput(truncated, 255.0),
    ssim=ssim,
    lpips_sees=truncated_to_signed,
    is_sampled=True,
)

_ALL = (DEFAULT_V1, LAVINAL712_V1, LIGHTNINGDIT_V1, DC_AE_V1, SEED_VOKEN_V1, LDM_V1)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
