"""Subcommands about weight files: what they are, and how they get from one place to another."""

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
    dtype_named,
    progress,
    read,
    say,
    warn,
)
from vae.cli.precision import make_float16_safe, print_audit, print_drift
from vae.errors import require

if TYPE_CHECKING:
    import torch

    from vae.checkpoints import Found


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
) -> None:
    """Say what a file is: family, architecture, precision, scale, soundness, and which programs can load it.

    Example: vae inspect runs/first --audit photos
    """
    from dataclasses import asdict

    from vae.checkpoints.clients import warnings_of
    from vae.checkpoints.report import facts_of, notes_of, soundness, title_of
    from vae.errors import InputError

    found = read(model, config, family, ema=ema, finite=False)
    broken, values = soundness(found)
    say(f"{found.file}: {title_of(found)}")
    for name, value in (values | facts_of(found) | asdict(found.config) | notes_of(found)).items():
        say(f"{name:>24}  {value}")
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
    from vae.checkpoints import lost_in_half
    from vae.checkpoints.clients import warnings_about
    from vae.evaluation.models import find_device
    from vae.training.export import export_checkpoint
    from vae.training.manifest import checkpoints_in, newest_whole, step_name

    folder = run.expanduser() / "checkpoints"
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
    """Take the autoencoder out of a full checkpoint, as it is stored unless --dtype says otherwise.

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
    """Put an autoencoder into a full checkpoint; every other tensor stays as it is, byte for byte.

    Example: vae bake mine.vae.safetensors sd15.safetensors sd15-mine.safetensors
    """
    from vae.checkpoints import bake as baking
    from vae.checkpoints.clients import warnings_of

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


def _write(found: "Found", target: Path, dtype: "torch.dtype | None") -> None:
    from vae.checkpoints import SINGLE_FILE, save_found
    from vae.checkpoints.clients import warnings_about, warnings_of
    from vae.checkpoints.tiny import HALVES, PAIR_FILE, file_of_half

    target = target.expanduser()
    layout = save_found(found, target, dtype)
    is_pair = found.config.architecture == "tiny" and PAIR_FILE.fullmatch(target.name) is not None
    files = [file_of_half(target, half) for half in HALVES] if is_pair else [target]
    say(f"{layout} layout written to {' and '.join(map(str, files))}, {found.kind} weights of {found.file}")
    for line in _lost(found, dtype, layout):
        say(line)
    needs_family = found.config.architecture == "kl" or (target.suffix == SINGLE_FILE and not is_pair)
    for line in warnings_of(found) if needs_family else warnings_about(found.config):
        warn(line)


def _lost(found: "Found", dtype: "torch.dtype | None", layout: str) -> list[str]:
    """What the weights lost where they were cast: as asked for, and in a folder's float16 variant."""
    import torch

    from vae.checkpoints.writing import beyond, narrowed

    has_variant = layout == "diffusers" and beyond(found.state, torch.float16) is None
    written = dict.fromkeys([dtype, torch.float16 if has_variant else None])
    lost = [narrowed(found.state, one).words for one in written if one is not None]
    return [words for words in lost if words is not None]
