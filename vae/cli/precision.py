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
    from vae.models.interface import Autoencoder


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
    from vae.audit.rescale import rescale_checked
    from vae.models.architectures import as_kl

    model = as_kl(found.build(), "--fp16-safe", "none: no norm in it undoes a scale; vae inspect --audit measures it")
    pictures = _pictures(found, images, resolution, device)
    model.to(pictures[0].device)
    before = _audit(model, pictures)
    say(f"before: {before.verdict}")
    done = rescale_checked(model, before, pictures)
    difference = f"float32 images differ by at most {done.images:.1e}, latents by {done.latents:.1e}"
    say(f"{done.layers} layers rescaled; {difference}")
    if not done.is_exact:
        raise InputError(
            f"{found.file}: rescaling it changes its images; keep it in bfloat16 or float32. Nothing written"
        )
    after = _audit(model, pictures) if done.layers else before
    say(f"after:  {after.verdict}")
    if not after.is_safe:
        warn("rescaling was not enough; the export's force_upcast tells diffusers to compute in float32")
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()} if done.layers else found.state
    notes = replace(found.notes, training=found.notes.training | {"precision": after.verdict})
    return replace(found, state=state, notes=notes, config=replace(found.config, force_upcast=not after.is_safe))


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
    assumed = ", ".join(
        f"{each.file} has groups of {each.config.norm_num_groups}"
        for each in {each.file: each for each in (theirs, found)}.values()
        if not each.groups_are_known
    )
    verdict = f"{drift.verdict}, if {assumed}, which is assumed" if assumed else drift.verdict
    (say if drift.is_tolerable else warn)(f"against {theirs.file}: {verdict}")


def _pictures(found: "Found", images: Path, resolution: int, device: str) -> "list[torch.Tensor]":
    from vae.evaluation.models import find_device

    where = find_device(device)
    return [picture.to(where) for picture in audit_images(images, found.config, resolution)]


def _audit(model: "Autoencoder", pictures: "list[torch.Tensor]") -> "PrecisionAudit":
    from vae.audit.precision import audit_precision, audit_steps

    with progress("Auditing precision", audit_steps(pictures)) as advance:
        return audit_precision(model, pictures, lambda: advance(1))


def _say_audit(audit: "PrecisionAudit", layers: int) -> None:
    say(audit.verdict)
    for layer, peak in audit.largest[:layers]:
        say(f"{peak:>24,.1f}  {layer}")
    for name, psnr in audit.psnr.items():
        say(f"{name:>24}  {psnr:.1f} dB from float32")
