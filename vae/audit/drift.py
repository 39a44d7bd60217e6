"""How far latents have moved from another autoencoder's: whether its diffusion models can go on using them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vae.latents import scale_latents
from vae.models.autoencoder_config import encoder_differences
from vae.models.interface import Autoencoder

TOLERATED = 0.02  # of the latents' own spread; what drop-in replacements stay within


@dataclass(frozen=True)
class Drift:
    """How an encoder differs from the base's, and its latents, these in units of the base's standard deviation.

    `changed` are tensors that differ, `unlike` the settings, each in words: equal weights in other groups are another
    function.
    """

    changed: list[str]
    unlike: list[str]
    encoder_tensors: int
    rms: float  # root mean square difference of the posterior means
    shift: float  # largest difference of a channel's mean
    stretch: float  # largest relative difference of a channel's standard deviation

    @property
    def is_same(self) -> bool:
        return not self.changed and not self.unlike

    @property
    def is_tolerable(self) -> bool:
        return max(self.rms, self.shift, self.stretch) <= TOLERATED

    @property
    def verdict(self) -> str:
        if self.is_same:
            return f"same latents: all {self.encoder_tensors} encoder tensors are identical bit for bit"
        moved = f"rms {self.rms:.2%}, mean {self.shift:.2%}, std {self.stretch:.2%} of the base's spread"
        count = f"{len(self.changed)} of {self.encoder_tensors} encoder tensors differ"
        differences = "; ".join([count, *self.unlike])
        if self.is_tolerable:
            return f"nearly the same latents: {differences}; {moved}"
        return f"latents have drifted: {differences}; {moved}. A diffusion model trained on the base will not fit"


@torch.no_grad()
def latent_drift(base: Autoencoder, model: Autoencoder, images: Sequence[Tensor]) -> Drift:
    """Both encode `images`, each (B, C, H, W) in [-1, 1]. Their configurations have latents of the same shape.

    Of two architectures the latents are compared as diffusion models see them: a tiny autoencoder has no others.
    """
    unlike = base.config.architecture != model.config.architecture
    theirs, ours = _encoder_of(base), _encoder_of(model)
    shared = theirs.keys() & ours.keys()
    changed = [name for name in theirs | ours if name not in shared or not torch.equal(theirs[name], ours[name])]
    before, after = (
        torch.cat([_latents(one, image, scaled=unlike) for image in images], dim=1) for one in (base, model)
    )
    spread = before.std()
    return Drift(
        changed=changed,
        unlike=encoder_differences(model.config, base.config, "the base's"),
        encoder_tensors=len(theirs | ours),
        rms=((after - before).square().mean().sqrt() / spread).item(),
        shift=((after.mean(dim=1) - before.mean(dim=1)).abs().max() / spread).item(),
        stretch=(after.std(dim=1) / before.std(dim=1) - 1.0).abs().max().item(),
    )


def _latents(model: Autoencoder, image: Tensor, *, scaled: bool) -> Tensor:
    """(latent_channels, elements)"""
    latents = model.encode(image).mean
    return (scale_latents(latents, model.config) if scaled else latents).transpose(0, 1).flatten(1)


def _encoder_of(model: Autoencoder) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
