"""The activations of every layer: how large they become, and what is left of them in a smaller number format.

Is an autoencoder safe in float16? Measured on images, said in one sentence.

How far activations exceed what float16 should have to hold, as something to learn from."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vae.latents import unscale_latents
from vae.models.arithmetic import float32_arithmetic
from vae.models.autoencoder_kl import Attention, ResnetBlock
from vae.models.autoencoder_tiny import TinyBlock
from vae.models.base import Autoencoder
from vae.models.fused import layer_by_layer

WRITERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, ResnetBlock, Attention, TinyBlock)  # modules whose output lies in memory
QUERIES_AT_ONCE = 1024


@contextmanager
def observed(model: Autoencoder, change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block `change(name, output)` sees the output of every layer, and may replace it."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _module, _inputs, output: change(name, output)

    writers = [(name, module) for name, module in model.named_modules() if isinstance(module, WRITERS)]
    hooks = [module.register_forward_hook(hook_for(name)) for name, module in writers]
    try:
        with layer_by_layer():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def peaks_of(model: Autoencoder) -> Iterator[dict[str, float]]:
    """{layer: largest absolute value it put out} over everything that goes through `model` within the block.

    `NAME.scores` are an attention's products of queries and keys before they are scaled down, as the original LDM code
    and the web UIs that follow it hold them in memory; fused kernels do not.
    """
    peaks: dict[str, float] = {}
    queries: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), _largest(output))
        block, _, projection = name.rpartition(".")
        if projection == "to_q":
            queries[block] = output
        elif projection == "to_k":
            scores = _largest_product(queries.pop(block), output)
            peaks[f"{block}.scores"] = max(peaks.get(f"{block}.scores", 0.0), scores)

    with observed(model, note):
        yield peaks


@contextmanager
def rounding(model: Autoencoder, dtype: torch.dtype) -> Iterator[None]:
    """Within the block `model`, in float32, computes as accelerators do in `dtype`.

    Weights and every layer's output are rounded to it, sums within a layer are in float32. So it runs at full speed on
    any machine and gives the same verdict on all of them.
    """
    weights = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data, dtype)
    try:
        with observed(model, lambda _, output: _rounded(output, dtype)):
            yield
    finally:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _largest(x: Tensor) -> float:
    """The largest absolute value; NaN, which no comparison finds, counts as infinite."""
    largest = x.detach().abs().max().item()
    return math.inf if math.isnan(largest) else largest


def _largest_product(queries: Tensor, keys: Tensor) -> float:
    """Of all pairs of tokens, (B, heads, N, C) each."""
    products = (_largest(part @ keys.transpose(2, 3)) for part in queries.split(QUERIES_AT_ONCE, dim=2))
    return max(products)


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


class Excess:
    """By how much the largest activation of each image exceeds `limit`, in limits: mean over images, sum over layers.

    Only of what depends on what learns. An attention's products of queries and keys count before they are scaled down,
    as the original LDM code holds them in memory.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._found: list[Tensor] = []
        self._queries: dict[str, Tensor] = {}

    @property
    def total(self) -> Tensor | None:
        """None where nothing that was seen learns."""
        return torch.stack(self._found).sum() if self._found else None

    def note(self, name: str, output: Tensor) -> None:
        """Of a layer: its output (B, ...), in float32 whatever the layers compute in."""
        with torch.autocast(output.device.type, enabled=False):
            self._add(output.float())
            block, _, projection = name.rpartition(".")
            if projection == "to_q":
                self._queries[block] = output.float()
            elif projection == "to_k":
                self._add(self._queries.pop(block) @ output.float().transpose(-1, -2))

    def _add(self, output: Tensor) -> None:
        if output.requires_grad:
            largest = output.abs().flatten(1).amax(dim=1)
            self._found.append(torch.relu(largest / self.limit - 1.0).mean())


@contextmanager
def excess_of(model: Autoencoder, limit: float) -> Iterator[Excess]:
    """Of everything that goes through `model` within the block; its layers are computed one by one there."""
    excess = Excess(limit)
    with observed(model, excess.note):
        yield excess
