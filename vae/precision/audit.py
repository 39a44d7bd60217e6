"""The audit of an autoencoder's activations: how large they become in every layer, and what float16 leaves of them.

`audit_precision` measures on images whether a model is safe in float16, and says so in one sentence. `peaks_of` and
`rounding` are the two measurements it consists of. `excess_of` gives, with a gradient, how far activations exceed what
float16 should have to hold, as a term to train with.
"""

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

WRITERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, ResnetBlock, Attention, TinyBlock)  # whose output is held in memory
QUERIES_AT_ONCE = 1024


@contextmanager
def observed(model: Autoencoder, change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Let `change(name, output)` see the output of every layer within the block. It may return a replacement."""

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
    """Yield {layer: largest absolute value of its output} over everything that goes through `model` within the block.

    `NAME.scores` are an attention's products of queries and keys before they are scaled down. The original LDM code,
    and the web UIs that follow it, hold them in memory. Fused kernels do not.
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
    """Let `model`, which is in float32, compute within the block as accelerators do in `dtype`.

    Weights and every layer's output are rounded to `dtype`. Sums within a layer are in float32. So it runs at full
    speed on any machine, and gives the same verdict on all of them.
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
    """Return the values that `dtype` has for those of `x`, in the dtype of `x`."""
    return x.to(dtype).to(x.dtype)


def _largest(x: Tensor) -> float:
    """Return the largest absolute value. NaN, which no comparison finds, counts as infinite."""
    largest = x.detach().abs().max().item()
    return math.inf if math.isnan(largest) else largest


def _largest_product(queries: Tensor, keys: Tensor) -> float:
    """Return the largest absolute product of a query and a key, (B, heads, N, C) each.

    The products of `QUERIES_AT_ONCE` queries are in memory at a time.
    """
    products = (_largest(part @ keys.transpose(2, 3)) for part in queries.split(QUERIES_AT_ONCE, dim=2))
    return max(products)


FLOAT16_MAX = 65504.0
HEADROOM = 4.0  # float16 must be able to hold this many times the largest activation seen
FIDELITY = 40.0  # dB between the float16 and the float32 image; a difference below one grey level
PRIOR_SPREAD = 1.5  # std of further latents: wider than any diffusion model is trained to make them
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EXTREMES = 3  # images that are audited besides the given ones


@dataclass(frozen=True)
class PrecisionAudit:
    """What float16 and bfloat16 do to a model.

    `peaks` is {layer: largest |activation| in float32}. `psnr` is {format: dB of its images against those in float32},
    -inf where an image is not finite.
    """

    peaks: dict[str, float] = field(repr=False)
    psnr: dict[str, float]

    @property
    def largest(self) -> list[tuple[str, float]]:
        """The layers with their peaks, the largest first."""
        return sorted(self.peaks.items(), key=lambda item: -item[1])

    @property
    def headroom(self) -> float:
        """How many times the largest activation fits into float16."""
        return FLOAT16_MAX / max(self.largest[0][1], 1e-30)

    @property
    def is_safe(self) -> bool:
        """Whether float16 has enough headroom for activations, and its images are close enough to float32's."""
        return self.headroom >= HEADROOM and self.psnr["float16"] >= FIDELITY

    @property
    def verdict(self) -> str:
        """The result in one sentence, for example "safe in float16: yes, because ..."."""
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

    Saturated and noisy images and latents of the prior are audited too, all of the first image's size, since
    activations are largest there. `model` must be in float32 and on the images' device. It is unchanged afterwards.
    `advance` is called `audit_steps(images)` times.
    """
    with peaks_of(model) as peaks:
        latents = [_and(advance, model.encode(image).mode()) for image in [*images, *_extremes(images[0])]]
        latents.append(_prior(model, latents[0]))
        exact = [_and(advance, model.decode(latent)) for latent in latents]

    count = len(images)
    psnr = {}
    for name, dtype in FORMATS.items():
        judged = latents if dtype is torch.float16 else latents[:count]  # bfloat16 has the range of float32
        with rounding(model, dtype):
            moments_are_finite = bool(model.encode(images[0]).mean.isfinite().all())
            rounded = [_and(advance, model.decode(latent)) for latent in judged]
        finite = moments_are_finite and all(image.isfinite().all() for image in rounded)
        psnr[name] = _psnr(rounded[:count], exact[:count]) if finite else -math.inf
    return PrecisionAudit(peaks, psnr)


def audit_steps(images: Sequence[Tensor]) -> int:
    """Return how often `audit_precision` calls `advance`: once for each encoding and each decoding."""
    count = len(images)
    encoded = count + EXTREMES
    decoded = count + EXTREMES + 1
    return encoded + 2 * decoded + count


def _and(advance: Callable[[], object], result: Tensor) -> Tensor:
    """Call `advance`, and pass the result on."""
    advance()
    return result


def _extremes(like: Tensor) -> list[Tensor]:
    """Return white, saturated stripes and uniform noise, each of the size of `like`, and the same every time."""
    white = torch.ones_like(like[:1])
    stripes = white.clone()
    stripes[..., ::2] = -1.0
    stripes[:, 1:, ::2] *= -1.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(white.shape, generator=generator).to(like) * 2.0 - 1.0
    return [white, stripes, noise]


def _prior(model: Autoencoder, like: Tensor) -> Tensor:
    """Return raw latents whose scaled form is N(0, PRIOR_SPREAD^2).

    An assumed scaling factor is good enough here, since it is of about the right size.
    """
    noise = torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(0)).to(like)
    return unscale_latents(PRIOR_SPREAD * noise, model.config.taking_its_scale())


def _psnr(images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the PSNR in dB over all pixels of all images in [-1, 1], clamped as they are shown."""
    errors = [(a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten() for a, b in zip(images, exact, strict=True)]
    return 10 * math.log10(4.0 / max(torch.cat(errors).mean().item(), 1e-30))


class Excess:
    """The excess of each layer's and image's largest activation over `limit`, in multiples of `limit`.

    It is a mean over images and a sum over layers. Only activations that depend on parameters that learn count. An
    attention's products of queries and keys count before they are scaled down, as the original LDM code holds them in
    memory.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._found: list[Tensor] = []
        self._queries: dict[str, Tensor] = {}

    @property
    def total(self) -> Tensor | None:
        """The sum over layers, a scalar with a gradient. None where nothing that was seen learns."""
        return torch.stack(self._found).sum() if self._found else None

    def note(self, name: str, output: Tensor) -> None:
        """Add the output (B, ...) of the layer `name`, in float32 whatever the layers compute in."""
        with torch.autocast(output.device.type, enabled=False):
            self._add(output.float())

            block, _, projection = name.rpartition(".")
            if projection == "to_q":
                self._queries[block] = output.float()
            elif projection == "to_k":
                self._add(self._queries.pop(block) @ output.float().transpose(-1, -2))

    def _add(self, output: Tensor) -> None:
        """Add the excess of one tensor (B, ...), if it has a gradient."""
        if output.requires_grad:
            largest = output.abs().flatten(1).amax(dim=1)
            self._found.append(torch.relu(largest / self.limit - 1.0).mean())


@contextmanager
def excess_of(model: Autoencoder, limit: float) -> Iterator[Excess]:
    """Yield the `Excess` of everything that goes through `model` within the block.

    The layers are computed one by one there, so that each output can be seen.
    """
    excess = Excess(limit)
    with observed(model, excess.note):
        yield excess
