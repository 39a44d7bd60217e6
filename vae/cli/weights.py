"""Subcommands about weight files: `inspect`, `convert`, `export`, `extract`, `bake` and `install`.

`inspect` says what a file is, the others bring weights from one place or format to another. The first half holds the
parts of `inspect` and `convert` that run a model: what float16 does to it, and how far its latents have moved.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.cli.common import (
    PHOTOS,
    Base,
    Config,
    Device,
    Dtype,
    Ema,
    Family,
    Model,
    Resolution,
    Target,
    audit_images,
    dtype_named,
    read,
)
from vae.console import progress, say, warn
from vae.errors import InputError, require
from vae.run_dir import RunDir, step_name

WebUI = Annotated[Path, typer.Option(help="folder of A1111, Forge, reForge, ComfyUI, SD.Next or Fooocus")]
MenuName = Annotated[str | None, typer.Option(help="what the menu calls it; the run's, folder's or file's name else")]
Replace = Annotated[bool, typer.Option("--replace", help="replace a file of that name that has another content")]

if TYPE_CHECKING:
    import torch

    from vae.models.base import Autoencoder
    from vae.precision.audit import PrecisionAudit
    from vae.weights.loaded import LoadedWeights


def print_audit(found: "LoadedWeights", images: Path, resolution: int, device: str, layers: int) -> None:
    """Measure on images what float16 does to the model, and print the verdict with the `layers` largest activations.

    `images` is an image, a folder, or "photos" for the embedded photographs; squares of `resolution` pixels are cut
    from them.
    """
    from vae.precision.audit import EXTREMES

    pictures = _pictures(found, images, resolution, device)
    audit = _audit(found.build().to(pictures[0].device), pictures)
    say(f"{len(pictures)} images at {resolution} px, {EXTREMES} extreme ones and latents of the prior:")
    _say_audit(audit, layers)

    if found.config.force_upcast == audit.is_safe:
        given = found.config.force_upcast
        say(f"force_upcast is {given} and should be {not given}; vae convert --fp16-safe sets it")


def make_float16_safe(found: "LoadedWeights", images: Path, resolution: int, device: str) -> "LoadedWeights":
    """Return `found` with weights rescaled for float16, and with `force_upcast` as measured afterwards.

    Raises InputError where rescaling would change the model's images, and for architectures without group norms, since
    nothing in them undoes a scale.
    """
    from vae.models.autoencoder_kl import as_kl
    from vae.precision.rescale import rescale_checked

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


def print_drift(found: "LoadedWeights", base: Path, images: Path, resolution: int, device: str) -> None:
    """Print how far the latents of `found` have moved from those of `base` on some images.

    Raises InputError where the two do not encode the same images to latents of the same shape.
    """
    from vae.evaluation.drop_in import latent_drift

    theirs = read(base)
    before, now = ((c.in_channels, c.downsample_factor, c.latent_channels) for c in (theirs.config, found.config))
    if before != now:
        shapes = " and ".join(f"{channels} channels to f{f}c{latent}" for channels, f, latent in (before, now))
        raise InputError(f"{theirs.file} and {found.file}: {shapes}; they cannot be compared")

    pictures = _pictures(found, images, resolution, device)
    base_model, model = (each.build().to(pictures[0].device) for each in (theirs, found))
    drift = latent_drift(base_model, model, pictures)

    # The number of groups cannot be read from the weights. Where a file does not state it, the verdict says so.
    assumed = ", ".join(
        f"{each.file} has groups of {each.config.norm_num_groups}"
        for each in {each.file: each for each in (theirs, found)}.values()
        if not each.groups_are_known
    )

    verdict = f"{drift.verdict}, if {assumed}, which is assumed" if assumed else drift.verdict
    (say if drift.is_tolerable else warn)(f"against {theirs.file}: {verdict}")


def _pictures(found: "LoadedWeights", images: Path, resolution: int, device: str) -> "list[torch.Tensor]":
    """Return a few central squares of `images`, on the device. See `audit_images`."""
    from vae.evaluation.measure import find_device

    where = find_device(device)
    return [picture.to(where) for picture in audit_images(images, found.config, resolution)]


def _audit(model: "Autoencoder", pictures: "list[torch.Tensor]") -> "PrecisionAudit":
    """Audit the model's precision on pictures, with a progress bar."""
    from vae.precision.audit import audit_precision, audit_steps

    with progress("Auditing precision", audit_steps(pictures)) as advance:
        return audit_precision(model, pictures, lambda: advance(1))


def _say_audit(audit: "PrecisionAudit", layers: int) -> None:
    """Print an audit: the verdict, the `layers` largest activations, and the PSNR of each format."""
    say(audit.verdict)
    for layer, peak in audit.largest[:layers]:
        say(f"{peak:>24,.1f}  {layer}")
    for name, psnr in audit.psnr.items():
        say(f"{name:>24}  {psnr:.1f} dB from float32")


def inspect(
    model: Model,
    audit: Annotated[Path | None, typer.Option(help="a folder of images, or photos: measure float16 on them")] = None,
    layers: Annotated[int, typer.Option(min=1, help="how many layers --audit lists, the largest first")] = 5,
    base: Base = None,
    config: Config = None,
    family: Family = None,
    ema: Ema = False,
    resolution: Resolution = 256,
    device: Device = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", help="every setting and every note of the file")] = False,
) -> None:
    """Say what a file is: soundness, who can load it, family, precision, scale, and how it was trained.

    Example: vae inspect runs/first --audit photos
    """
    from vae.errors import InputError
    from vae.weights.describe import everything_of, soundness, summary_of, title_of, warnings_of

    found = read(model, config, family, ema=ema, finite=False)
    broken, values = soundness(found)

    say(f"{found.file}: {title_of(found)}")
    shown = values | everything_of(found) if verbose else summary_of(found, values)
    for name, value in shown.items():
        say(f"{name:>24}  {value}" if verbose else f"{name:>10}  {value}")
    for line in warnings_of(found):
        warn(line)

    if broken:
        raise InputError(f"{found.file}: {len(broken)} tensors hold NaN or infinite values, first {broken[:3]}")

    if audit is not None:
        print_audit(found, audit, resolution, device, layers)
    if base is not None:
        print_drift(found, base, audit or Path(PHOTOS), resolution, device)


def convert(
    model: Model,
    target: Target,
    dtype: Dtype = "float32",
    fp16_safe: Annotated[bool, typer.Option("--fp16-safe", help="rescale weights so that float16 is safe")] = False,
    images: Annotated[Path, typer.Option(help="for --fp16-safe and --base: a folder, or photos")] = Path(PHOTOS),
    base: Base = None,
    config: Config = None,
    family: Family = None,
    ema: Ema = False,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Rewrite a model in another published layout or precision.

    Example: vae convert runs/first models/VAE/first.vae.safetensors --dtype float16 --fp16-safe
    """
    precision = dtype_named(dtype)
    found = read(model, config, family, ema=ema)

    has_use = fp16_safe or base is not None
    require(has_use or images == Path(PHOTOS), f"--images {images}", "--fp16-safe or --base with it")

    if fp16_safe:
        found = make_float16_safe(found, images, resolution, device)
    if base is not None:
        print_drift(found.cast(target, precision), base, images, resolution, device)

    _write(found, target, precision)


def export(
    run: Annotated[Path, typer.Argument(help="the directory of a run")],
    step: Annotated[int | None, typer.Option(help="the update whose checkpoint is meant; the last one else")] = None,
    device: Device = "auto",
    live: Annotated[bool, typer.Option("--live", help="the weights themselves, not their moving average")] = False,
    images: Annotated[str | None, typer.Option(help="measure on this folder, not on the run's validation set")] = None,
) -> None:
    """Publish the weights of a run's checkpoint, as the run itself does at its end.

    Example: vae export runs/first --step 20000
    """
    from vae.evaluation.measure import find_device
    from vae.training.export import export_checkpoint
    from vae.training.manifest import checkpoints_in, newest_whole
    from vae.weights import lost_in_half
    from vae.weights.describe import warnings_about

    folder = RunDir(run).checkpoints
    there = [path.name for path in checkpoints_in(folder)]
    require(bool(there), f"{folder}: no checkpoint in it", "the directory of a run")
    checkpoint = newest_whole(folder)[0] if step is None else folder / f"{step_name(step)}.ckpt"
    require(checkpoint.is_file(), f"{checkpoint}: no such checkpoint", f"one of {there}")

    paths, config = export_checkpoint(run.expanduser().resolve(), checkpoint, find_device(device), images, live=live)
    for path in paths:
        say(f"written  {path}")

    lost = lost_in_half(paths[0])
    if lost is not None:
        say(lost)
    for line in warnings_about(config):
        warn(line)


def extract(checkpoint: Model, target: Target, dtype: Dtype = None, config: Config = None) -> None:
    """Take the autoencoder out of a full checkpoint. It keeps its stored precision unless --dtype says otherwise.

    Example: vae extract sd15.safetensors sd15.vae.safetensors
    """
    precision = dtype_named(dtype)
    _write(read(checkpoint, config), target, precision)


def bake(
    model: Model,
    checkpoint: Annotated[Path, typer.Argument(help="a full checkpoint")],
    target: Annotated[Path, typer.Argument(help="the new full checkpoint, NAME.safetensors")],
    config: Config = None,
) -> None:
    """Put an autoencoder into a full checkpoint. Every other tensor stays as it is, byte for byte.

    Example: vae bake mine.vae.safetensors sd15.safetensors sd15-mine.safetensors
    """
    from vae.weights import bake as baking
    from vae.weights.describe import warnings_of

    found = read(model, config)
    with progress("Baking", baking.size_after(found, checkpoint)) as advance:
        done = baking.bake(found, checkpoint, target, advance)

    kind = str(done.dtype or found.dtype).removeprefix("torch.")
    say(f"{done.kept} tensors copied, {done.replaced} old ones of the autoencoder removed")
    say(f"{done.written} tensors written to {target} under {done.prefix!r} as {kind}")

    if done.lost is not None and done.lost.words is not None:
        say(done.lost.words)
    for line in warnings_of(found, done.family):
        warn(line)


def _write(found: "LoadedWeights", target: Path, dtype: "torch.dtype | None") -> None:
    """Write weights to `target` in the layout that its name asks for, and print what was written.

    Further lines say what casting lost, and what a program has to be told that loads the file.
    """
    from vae.weights import SINGLE_FILE, save_found
    from vae.weights.describe import warnings_about, warnings_of
    from vae.weights.taesd import HALVES, PAIR_FILE, file_of_half

    target = target.expanduser()
    layout = save_found(found, target, dtype)

    # TAESD is published as two files, one for each half.
    is_pair = layout == "taesd" and PAIR_FILE.fullmatch(target.name) is not None
    files = [file_of_half(target, half) for half in HALVES] if is_pair else [target]
    say(f"{layout} layout written to {' and '.join(map(str, files))}, {found.kind} weights of {found.file}")

    for line in _lost(found, dtype, layout):
        say(line)

    needs_family = not found.config.latents_are_scaled or (target.suffix == SINGLE_FILE and not is_pair)
    for line in warnings_of(found) if needs_family else warnings_about(found.config):
        warn(line)


def _lost(found: "LoadedWeights", dtype: "torch.dtype | None", layout: str) -> list[str]:
    """Return, in words, what the weights lost by being cast.

    They are cast to the dtype asked for, and to float16 for the variant that a diffusers folder holds too.
    """
    import torch

    from vae.weights.safetensors_io import beyond, narrowed

    has_variant = layout == "diffusers" and beyond(found.state, torch.float16) is None
    written = dict.fromkeys([dtype, torch.float16 if has_variant else None])
    lost = [narrowed(found.state, one).words for one in written if one is not None]
    return [words for words in lost if words is not None]


def install(
    model: Model,
    webui: WebUI,
    name: MenuName = None,
    dtype: Dtype = None,
    family: Family = None,
    replace: Replace = False,
) -> None:
    """Copy a VAE to where a web UI looks for it, and say in which menu it is. Of a run the best export is taken.

    Example: vae install runs/first --webui ~/ComfyUI
    """
    from vae.weights.describe import warnings_of
    from vae.weights.install import check_held, check_name, find_program, name_of, put
    from vae.weights.safetensors_io import narrowed

    precision = dtype_named(dtype)
    place = find_program(webui)
    program = place.program
    called = check_name(name_of(model) if name is None else name)
    file = place.file(called)

    found = read(model, family=family)
    check_held(found, program)
    is_new = put(found, file, precision, replace=replace)

    from_where = "" if place.root == webui.expanduser().absolute() else f", found from {webui}"
    say(f"{program.name} in {place.root}{from_where}")
    say(f"{'written to' if is_new else 'already there:'} {file}")
    say(f"{found.kind} weights of {found.file}")

    lost = None if precision is None else narrowed(found.state, precision).words
    for line in (lost, *place.notes(called)):
        if line is not None:
            say(line)
    for line in warnings_of(found):
        warn(line)

    say(f"choose {file.name} in: {program.menu}")
    say(f"if {program.name} is running, first {program.refresh}")
