"""The parts of `vae inspect` and `vae convert` that run a model: what float16 does to it, and how its latents moved."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vae.cli.common import audit_images, progress, read, say, warn
from vae.errors import InputError

if TYPE_CHECKING:
    import torch

    from vae.audit.precision import PrecisionAudit
    from vae.checkpoints import Found
    from vae.models.autoencoder import AutoencoderKL

EQUAL = 1e-4  # largest difference of images in [-1, 1] that an exact rescaling may leave


def print_audit(found: "Found", images: Path, resolution: int, device: str, layers: int) -> None:
    from vae.audit.precision import EXTREMES

    pictures = _pictures(found, images, resolution, device)
    audit = _audit(found.build().to(pictures[0].device), pictures)
    say(f"{len(pictures)} images at {resolution} px, {EXTREMES} extreme ones and latents of the prior:")
    _say_audit(audit, layers)
    if found.config.force_upcast == audit.is_safe:
        given = found.config.force_upcast
        say(f"force_upcast is {given} and should be {not given}; vae convert --fp16-safe sets it")


def make_float16_safe(found: "Found", images: Path, resolution: int, device: str) -> "Found":
    """`found` with rescaled weights and `force_upcast` as measured; refused where that changes its images."""
    import torch

    from vae.audit.rescale import rescale

    pictures = _pictures(found, images, resolution, device)
    model = found.build().to(pictures[0].device)
    before = _audit(model, pictures)
    say(f"before: {before.verdict}")
    with torch.no_grad():
        latents = [model.encode(picture).mode() for picture in pictures]
        exact = [model.decode(latent) for latent in latents]
        changed = rescale(model, before)
        rest = max(float((model.decode(a) - b).abs().max()) for a, b in zip(latents, exact, strict=True))
        moved = max(float((model.encode(a).mode() - b).abs().max()) for a, b in zip(pictures, latents, strict=True))
    say(f"{len(changed)} layers rescaled; float32 images differ by at most {rest:.1e}, latents by {moved:.1e}")
    if not rest <= EQUAL or not moved <= EQUAL * max(1.0, max(float(latent.abs().max()) for latent in latents)):
        raise InputError(
            f"{found.file}: rescaling it changes its images; keep it in bfloat16 or float32. Nothing written"
        )
    after = _audit(model, pictures) if changed else before
    say(f"after:  {after.verdict}")
    if not after.is_safe:
        warn("rescaling was not enough; the export's force_upcast tells diffusers to compute in float32")
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()} if changed else found.state
    return replace(found, state=state, config=replace(found.config, force_upcast=not after.is_safe))


def print_drift(found: "Found", base: Path, images: Path, resolution: int, device: str) -> None:
    from vae.audit.drift import latent_drift

    theirs = read(base)
    before, now = ((c.in_channels, c.downsample_factor, c.latent_channels) for c in (theirs.config, found.config))
    if before != now:
        shapes = " and ".join(f"{channels} channels to f{f}c{latent}" for channels, f, latent in (before, now))
        raise InputError(f"{theirs.file} and {found.file}: {shapes}; they cannot be compared")
    pictures = _pictures(found, images, resolution, device)
    base_model, model = (each.build().to(pictures[0].device) for each in (theirs, found))
    drift = latent_drift(base_model, model, pictures)
    (say if drift.is_tolerable else warn)(f"against {theirs.file}: {drift.verdict}")


def _pictures(found: "Found", images: Path, resolution: int, device: str) -> "list[torch.Tensor]":
    from vae.evaluation.models import find_device

    where = find_device(device)
    return [picture.to(where) for picture in audit_images(images, found.config, resolution)]


def _audit(model: "AutoencoderKL", pictures: "list[torch.Tensor]") -> "PrecisionAudit":
    from vae.audit.precision import audit_precision, audit_steps

    with progress("Auditing precision", audit_steps(pictures)) as advance:
        return audit_precision(model, pictures, lambda: advance(1))


def _say_audit(audit: "PrecisionAudit", layers: int) -> None:
    say(audit.verdict)
    for layer, peak in audit.largest[:layers]:
        say(f"{peak:>24,.1f}  {layer}")
    for name, psnr in audit.psnr.items():
        say(f"{name:>24}  {psnr:.1f} dB from float32")
