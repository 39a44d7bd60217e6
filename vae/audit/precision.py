"""Is an autoencoder safe in float16? Measured on images, said in one sentence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vae.audit.activations import peaks_of, rounding
from vae.latents import unscale_latents
from vae.models.arithmetic import float32_arithmetic
from vae.models.interface import Autoencoder

FLOAT16_MAX = 65504.0
HEADROOM = 4.0  # how many times larger than everything seen an activation must still be able to become
FIDELITY = 40.0  # dB between the float16 and the float32 image; a difference below one grey level
PRIOR_SPREAD = 1.5  # of latents beside the images': wider than any diffusion model is trained to make them
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EXTREMES = 3  # images that are audited beside the given ones


@dataclass(frozen=True)
class PrecisionAudit:
    """`peaks`: {layer: largest |activation| in float32}.

    `psnr`: {format: dB against float32}, -inf where an image is not finite.
    """

    peaks: dict[str, float] = field(repr=False)
    psnr: dict[str, float]

    @property
    def largest(self) -> list[tuple[str, float]]:
        """Layers by their peaks, the largest first."""
        return sorted(self.peaks.items(), key=lambda item: -item[1])

    @property
    def headroom(self) -> float:
        """How many times the largest activation fits into float16."""
        return FLOAT16_MAX / max(self.largest[0][1], 1e-30)

    @property
    def is_safe(self) -> bool:
        return self.headroom >= HEADROOM and self.psnr["float16"] >= FIDELITY

    @property
    def verdict(self) -> str:
        """ "safe in float16: yes, because ..." """
        layer, peak = self.largest[0]
        where = f"the largest activation is {peak:,.0f} of {FLOAT16_MAX:,.0f} (at {layer})"
        psnr = self.psnr["float16"]
        if self.is_safe:
            return f"safe in float16: yes, because {where} and float16 images are {psnr:.1f} dB from float32's"
        if peak > FLOAT16_MAX:
            return f"safe in float16: no, because {where} and overflows"
        if not math.isfinite(psnr):
            return f"safe in float16: no, because images come out as NaN, though {where}"
        if self.headroom < HEADROOM:
            return (
                f"safe in float16: no, because {where}, {self.headroom:.1f}x below it and not the {HEADROOM:g}x asked"
            )
        return f"safe in float16: no, because float16 images are {psnr:.1f} dB from float32's, below {FIDELITY:g} dB"


@torch.no_grad()
@float32_arithmetic()
def audit_precision(
    model: Autoencoder, images: Sequence[Tensor], advance: Callable[[], object] = lambda: None
) -> PrecisionAudit:
    """Encode and decode `images`, each (B, C, H, W) in [-1, 1], in float32, float16 and bfloat16.

    Also saturated and noisy images and latents of the prior, all of the first image's size, since activations are
    largest there. `model` is in float32 and on the images' device; it is unchanged afterwards. `advance` is called
    `audit_steps(images)` times.
    """
    with peaks_of(model) as peaks:
        latents = [_and(advance, model.encode(image).mode()) for image in [*images, *_extremes(images[0])]]
        latents.append(_prior(model, latents[0]))
        exact = [_and(advance, model.decode(latent)) for latent in latents]
    count, psnr = len(images), {}
    for name, dtype in FORMATS.items():
        judged = latents if dtype is torch.float16 else latents[:count]  # bfloat16 has the range of float32
        with rounding(model, dtype):
            moments_are_finite = bool(model.encode(images[0]).mean.isfinite().all())
            rounded = [_and(advance, model.decode(latent)) for latent in judged]
        finite = moments_are_finite and all(image.isfinite().all() for image in rounded)
        psnr[name] = _psnr(rounded[:count], exact[:count]) if finite else -math.inf
    return PrecisionAudit(peaks, psnr)


def audit_steps(images: Sequence[Tensor]) -> int:
    """How often `audit_precision` calls `advance`: each encoding, each decoding."""
    count = len(images)
    encoded, decoded = count + EXTREMES, count + EXTREMES + 1
    return encoded + 2 * decoded + count


def _and(advance: Callable[[], object], result: Tensor) -> Tensor:
    advance()
    return result


def _extremes(like: Tensor) -> list[Tensor]:
    """White, saturated stripes, uniform noise; one each, of `like`'s size. The same every time."""
    white = torch.ones_like(like[:1])
    stripes = white.clone()
    stripes[..., ::2] = -1.0
    stripes[:, 1:, ::2] *= -1.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(white.shape, generator=generator).to(like) * 2.0 - 1.0
    return [white, stripes, noise]


def _prior(model: Autoencoder, like: Tensor) -> Tensor:
    """Raw latents whose scaled form is N(0, PRIOR_SPREAD^2). An assumed factor will do: it is of about that size."""
    noise = torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(0)).to(like)
    return unscale_latents(PRIOR_SPREAD * noise, model.config.taking_its_scale())


def _psnr(images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Over all pixels as they are shown, of images in [-1, 1]."""
    errors = [(a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten() for a, b in zip(images, exact, strict=True)]
    return 10 * math.log10(4.0 / max(torch.cat(errors).mean().item(), 1e-30))
