"""Subcommands that make shards once, before training: `vae prepare` of images, `vae cache-latents` of latents."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae.cli.common import Device, Family, Model, Resolution, read
from vae.console import progress, say, warn
from vae.errors import InputError

if TYPE_CHECKING:
    import torch

    from vae.datasets.jobs import Job, Json
    from vae.distributed import Advance


Images = Annotated[
    str, typer.Argument(metavar="SRC", help="a folder, a .txt, .csv or .jsonl list, tar shards, or photos")
]
Folder = Annotated[Path, typer.Argument(metavar="DST", help="folder for the shards")]
Kind = Annotated[str | None, typer.Option(help="what SRC is: folder, list, webdataset, huggingface (else it tells)")]
Split = Annotated[str, typer.Option(help="of a Hugging Face data set")]
Column = Annotated[str | None, typer.Option(help="that holds the images, in a list or data set")]
Streaming = Annotated[bool, typer.Option("--streaming", help="fetch a data set of the hub shard by shard")]
ShardImages = Annotated[int, typer.Option(min=1, help="images of SRC to a shard")]
MaxCorrupt = Annotated[float, typer.Option(help="share of a shard's images that may be unreadable")]

DROPPED = "dropped.jsonl"
FEW_SHARDS = 25  # with fewer, one shard is more than twice the share that training holds out


def prepare(
    src: Images,
    dst: Folder,
    resolution: Annotated[int | None, typer.Option(help="shrink to this shorter side; never enlarges")] = None,
    min_side: Annotated[int | None, typer.Option(help="skip images with a shorter side below this")] = None,
    max_aspect: Annotated[float | None, typer.Option(help="skip images longer than this many times that")] = None,
    format: Annotated[str, typer.Option(help="jpeg (4:4:4), webp (4:2:0) or png (lossless)")] = "jpeg",
    quality: Annotated[int | None, typer.Option(help="of jpeg and webp, 1 to 100; 95 unless given")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="leave the bytes of what needs no resizing as they are")] = False,
    shard_images: ShardImages = 1000,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one a core unless given")] = None,
    max_corrupt: MaxCorrupt = 0.1,
    source: Kind = None,
    split: Split = "train",
    column: Column = None,
    streaming: Streaming = False,
) -> None:
    """Filter, shrink and re-encode images once, into tar shards to train on.

    Run the same command again to continue after an interruption. Under torchrun or srun the processes share the work.

    Example: vae prepare photos/ shards/ --resolution 512 --min-side 256
    """
    from vae.data.build import Named, open_whole
    from vae.datasets.jobs import Job
    from vae.datasets.prepare_images import SUFFIX, Treatment, prepare_shards
    from vae.distributed import cores

    source_folder = Path(src).expanduser().resolve()
    target = dst.expanduser().resolve()
    if source_folder.is_dir() and (target == source_folder or source_folder in target.parents):
        raise InputError(f"DST={str(dst)!r}: within SRC, so that the shards would lie among the images; name another")

    treatment = Treatment(resolution, min_side, max_aspect, format, quality, keep)
    images = open_whole(Named(src, warn, source, split, column, streaming))
    job = Job(dst.expanduser(), SUFFIX, images, treatment.described, shard_images, max_corrupt)

    def work(shards: Sequence[int], advance: "Advance") -> None:
        prepare_shards(job, treatment, shards, workers=workers or cores(), advance=advance)

    index = _run(job, "Preparing", work)
    if index is not None:
        _print_made(job, index)
        _print_training(job, index)


def cache_latents(
    model: Model,
    src: Images,
    dst: Folder,
    sample: Annotated[int | None, typer.Option(help="store draws from the posteriors, of this seed; else both")] = None,
    scaled: Annotated[bool, typer.Option("--scaled", help="as diffusion models see them, not raw")] = False,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32")] = "float16",
    resolution: Resolution = 256,
    flip: Annotated[bool, typer.Option("--flip", help="store those of the mirrored images too")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="images encoded at once")] = 16,
    shard_images: ShardImages = 1000,
    workers: Annotated[int | None, typer.Option(min=0, help="processes that decode; the cores, at most 4")] = None,
    family: Family = None,
    device: Device = "auto",
    max_corrupt: MaxCorrupt = 0.1,
    source: Kind = None,
    split: Split = "train",
    column: Column = None,
    streaming: Streaming = False,
) -> None:
    """Encode images once, into safetensors shards that vae.LatentShards reads to train a diffusion model.

    Run the same command again to continue after an interruption. Under torchrun or srun the processes share the work.

    Example: vae cache-latents runs/first photos/ latents/ --resolution 256 --flip
    """
    from vae.data.build import Named, open_whole
    from vae.datasets import cache_latents
    from vae.datasets.jobs import Job
    from vae.distributed import workers_for

    encoding = cache_latents.Encoding(resolution, sample, scaled, flip, dtype, batch_size)
    found = read(model, family=family)
    if not found.scale_is_known and not scaled:
        warn(f"{found.file} does not tell its scaling factor: none is written beside the latents; --family says it")

    autoencoder = found.build()
    options = encoding.described(autoencoder)

    images = open_whole(Named(src, warn, source, split, column, streaming))
    job = Job(dst.expanduser(), cache_latents.SUFFIX, images, options, shard_images, max_corrupt)

    autoencoder.to(_own_device(device))

    def work(shards: Sequence[int], advance: "Advance") -> None:
        cache_latents.encode_shards(job, encoding, autoencoder, shards, workers=workers_for(workers), advance=advance)

    index = _run(job, "Encoding", work)
    if index is not None:
        _print_made(job, index)
        enlarged = index["counts"][cache_latents.ENLARGED]
        side = resolution // found.config.downsample_factor
        kind = f"{dtype}, {'scaled' if scaled else 'raw'}, {found.config.latent_channels}x{side}x{side} an image"
        say(f"{', '.join(encoding.stored)}: {kind}; in Python: vae.LatentShards({str(dst)!r})")
        if enlarged:
            warn(f"{enlarged:,} images have less than {resolution} px: they were enlarged; vae prepare leaves such out")


def _run(job: "Job", label: str, work: "Callable[[Sequence[int], Advance], None]") -> "Json | None":
    """Do this process's part of a job, and say what it did.

    Returns the index of all shards if this process found them complete, else None: other processes still have shards to
    make. Raises InputError where no image was usable.
    """
    from vae.datasets.jobs import begin, conclude, unfinished
    from vae.distributed import place

    begin(job)

    here = place()
    todo = unfinished(job, here)
    mine = len(range(here.rank, job.shards, here.world))
    if len(todo) < mine:
        say(f"{mine - len(todo)} of {mine} shards are there already")

    with progress(label, sum(len(job.numbers(shard)) for shard in todo)) as advance:
        work(todo, advance)

    index = conclude(job)
    if index is None:
        said = f"process {here.rank} of {here.world} ({here.said_by}) has made its {mine} of {job.shards} shards"
        say(f"{said}; others are missing: their processes make them")
    elif not index["images"]:
        raise InputError(f"{job.folder}: no image is left of {len(job.source)}; {DROPPED} in it says why")
    return index


def _print_made(job: "Job", index: "Json") -> None:
    """Print how many images are in the shards, how large they are, and why images were skipped."""
    kept = index["images"]
    of = len(job.source)
    shards = f"{job.shards} shards" if job.shards > 1 else "one shard"
    say(f"{kept:,} of {of:,} images in {shards}, {index['bytes'] / 1e6:,.1f} MB: {job.folder}")

    for what, images in index["counts"].items():
        if images:
            say(f"{images:>10,}  {what}")
    for why, images in index["dropped"].items():
        say(f"{images:>10,}  skipped: {why}")

    if kept < of:
        say(f"each that is skipped stands in {job.folder / DROPPED}")


def _print_training(job: "Job", index: "Json") -> None:
    """Print the command that trains on the shards.

    Training holds out whole shards for validation. With few shards that is a large share of the images, so the remedies
    are printed too.
    """
    last = job.shards - 1
    pattern = job.folder / (f"{{000000..{last:06d}}}.tar" if last else "000000.tar")

    filled = sum(shard["images"] > 0 for shard in index["shards"])
    alone = " data.validation_root=..." if filled == 1 else ""
    say(f"vae train data=webdataset data.root={shlex.quote(str(pattern))}{alone}")

    if filled < FEW_SHARDS:
        share = f"training holds out whole shards, at least 1 of these {filled} ({1 / filled:.0%} of the images)"
        held_out = "a single shard cannot be divided into training and validation" if filled == 1 else share
        finer = max(1, len(job.source) // (2 * FEW_SHARDS))
        other = f"make finer shards in another folder, --shard-images {finer}"
        say(f"{held_out}: name other images by data.validation_root, or {other}")


def _own_device(name: str) -> "torch.device":
    """Return the device that `name` means. With auto each process of a machine takes the next GPU."""
    import torch

    from vae.evaluation.measure import find_device

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    shared = name == "auto" and local.isdecimal() and torch.cuda.is_available()
    return find_device(f"cuda:{int(local) % torch.cuda.device_count()}" if shared else name)
