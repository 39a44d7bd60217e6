"""Subcommands that run a model on images and latents: `encode`, `decode`, `reconstruct` and `measure`.

The first half is `vae measure`'s table, and how the measured factors get into the files of a model.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zlib import crc32

import typer
from rich.console import Console
from rich.table import Table

from vae.cli.common import (
    Device,
    Dtype,
    Family,
    Images,
    Memory,
    Model,
    Resolution,
    about,
    bytes_named,
    decoded,
    dtype_named,
    encoded,
    image_files,
    load,
    opened,
    place_of,
    raw_latents,
    save,
)
from vae.console import progress, say, warn
from vae.errors import InputError, require
from vae.run_dir import FILE_ENDING, RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from vae.config.model import AutoencoderConfig
    from vae.latents import LatentStatistics


def print_statistics(statistics: "LatentStatistics", images: int, resolution: int) -> None:
    """Print the mean and standard deviation of each latent channel, and the factors that follow from them."""
    table = Table("channel", "mean", "std")
    for channel, (mean, std) in enumerate(zip(statistics.channel_mean, statistics.channel_std, strict=True)):
        table.add_row(str(channel), f"{mean:.5f}", f"{std:.5f}")
    table.add_row("all", f"{statistics.mean:.5f}", f"{statistics.std:.5f}", style="bold")
    Console().print(table)
    say(f"{images} images at {resolution} px, {statistics.count:,} values per channel, posterior noise included")
    say(f"scaling_factor {statistics.scaling_factor:.6g} (1 / std), shift_factor {statistics.mean:.6g} (mean)")


def write_factors(model: Path, statistics: "LatentStatistics", images: int, *, per_channel: bool) -> None:
    """Write measured factors into every file of the export that `model` points at.

    With `per_channel` they are a mean and a standard deviation for each channel, else one factor for all. Never both:
    diffusers' SDXL pipelines divide by latents_std whenever it is there, on top of scaling_factor.
    """
    from vae.files import write_text
    from vae.weights import read_autoencoder, save_found
    from vae.weights.describe import warnings_about
    from vae.weights.model_card import CARD_FILE, may_be_written, model_card

    measured = statistics.summary() | {"images": images}
    warnings: list[str] = []
    for path in _files(model):
        found = read_autoencoder(path)
        config = _per_channel(found.config, statistics) if per_channel else _global(found.config, statistics)
        target = path if path.is_file() else found.file.parent
        notes = replace(found.notes, latents=measured)
        save_found(replace(found, config=config, notes=notes), target)
        say(f"written  {target}")

        # A folder's card is written with the folder. A single file's card lies beside the file.
        card = target.parent / CARD_FILE
        if target.is_file() and target.parent.parent.name == "exports" and card.is_file() and may_be_written(card):
            write_text(card, model_card(config, notes, sum(t.numel() for t in found.state.values()), found.family))
        warnings = warnings_about(config)

    for line in warnings:
        warn(line)


def check_writable(model: Path) -> None:
    """Refuse, before anything is measured, files that factors cannot be written into. Raises InputError."""
    from vae.weights import read_autoencoder

    for path in _files(model):
        found = read_autoencoder(path)
        is_ours = found.file.suffix == ".safetensors" and (path.is_dir() or found.layout != "diffusers")
        if found.others or not is_ours:
            raise InputError(f"{found.file}: not a safetensors file of its own; vae extract or convert it first")


def _per_channel(config: "AutoencoderConfig", statistics: "LatentStatistics") -> "AutoencoderConfig":
    """Return `config` with the mean and standard deviation of each channel, and a scaling factor of 1."""
    mean, std = statistics.channel_mean.tolist(), statistics.channel_std.tolist()
    return config.with_scale(1.0, latents_mean=mean, latents_std=std)


def _global(config: "AutoencoderConfig", statistics: "LatentStatistics") -> "AutoencoderConfig":
    """Return `config` with one scaling factor for all channels.

    A shift is written only where the model has one already, or has the number of latent channels of Flux.
    """
    from vae.weights.families import LATENT_CHANNELS

    has_shift = config.shift_factor is not None or config.latent_channels == LATENT_CHANNELS["flux"]
    shift = statistics.mean if has_shift else None
    return config.with_scale(statistics.scaling_factor, shift)


def _files(model: Path) -> list[Path]:
    """Return the weights that `model` points at, and in an export the single files beside the folder too."""
    from vae.weights.load import find_export

    path = find_export(model)
    is_export = path.name == "diffusers" and RunDir.of_export(path.parent) is not None
    return [path, *(sorted(path.parent.glob(f"*{FILE_ENDING}")) if is_export else [])]


Whole = Annotated[int | None, typer.Option("--resolution", min=1, help="cut this square from each, not the whole")]


def encode(
    model: Model,
    images: Images,
    output: Annotated[Path, typer.Option(help="folder for the latents")] = Path("latents"),
    sample: Annotated[int | None, typer.Option(help="draw from the posterior with this seed; else its mean")] = None,
    scaled: Annotated[bool, typer.Option("--scaled", help="as diffusion models see them, not raw")] = False,
    dtype: Dtype = "float32",
    resolution: Whole = None,
    family: Family = None,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Encode images to .latent files (safetensors). Raw ones open in ComfyUI's LoadLatent too.

    Example: vae encode runs/first photos/ --output latents
    """
    import torch

    from vae.data.sampler import seed_for
    from vae.data.transforms import center_crop, crop_to_multiple, to_model_range
    from vae.latents import scale_latents
    from vae.weights.latent_files import SUFFIX, write_latents

    precision = dtype_named(dtype)
    allowed = bytes_named(memory)
    autoencoder = load(model, device, family)
    config = autoencoder.config
    scaled = scaled or config.latents_are_scaled  # it has no raw latents

    unknown = f"--scaled, and {model} does not tell its scaling factor"
    require(config.scale_is_known or not scaled, unknown, "--family with it, or raw latents")
    if not config.scale_is_known:
        warn(f"{model} does not tell its scaling factor: none is written beside the latents; --family says it")

    drawn = "mean" if sample is None else f"sample, seed {sample}"
    files = image_files(images)
    made = 0
    with progress("Encoding", len(files)) as advance, torch.no_grad():
        for name, path, image in opened(files, config.in_channels):
            factor = config.downsample_factor
            pixels = center_crop(image, resolution) if resolution else crop_to_multiple(image, factor, path)
            with about(path):
                posterior = encoded(autoencoder, to_model_range(pixels)[None], allowed, advance)

            # Each image has its own seed, so that its draw does not depend on which other images are there.
            generator = torch.Generator(place_of(autoencoder))
            generator.manual_seed(seed_for(sample or 0, crc32(name.encode())))
            latents = posterior.mode() if sample is None else posterior.sample(generator)
            latents = scale_latents(latents, config) if scaled else latents

            target = output / f"{name}{SUFFIX}"
            made += 1
            write_latents(target, latents.to(precision), config, scaled=scaled, drawn=drawn)

    say(f"{made} latents in {output}, {'scaled' if scaled else 'raw'}, {drawn}")


def decode(
    model: Model,
    latents: Annotated[list[Path], typer.Argument(help=".latent files or folders of them")],
    output: Annotated[Path, typer.Option(help="folder for the images")] = Path("decoded"),
    family: Family = None,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Decode .latent files, of `vae encode` or of ComfyUI, to PNG images.

    A tiny model decodes the latents of a KL model too, for a quick look at them. It uses the scale that the file
    states, or that of --family.

    Example: vae decode runs/first latents/ --output decoded
    """
    import torch

    from vae.data.contact_sheet import to_picture
    from vae.data.transforms import to_uint8
    from vae.weights.latent_files import SUFFIX

    allowed = bytes_named(memory)
    autoencoder = load(model, device, family)
    files = image_files(latents, [SUFFIX])

    with progress("Decoding", len(files)) as advance, torch.no_grad():
        for name, path in files.items():
            raw = raw_latents(path, autoencoder.config, family)
            with about(path):
                pictures = to_uint8(decoded(autoencoder, raw, allowed, advance)).cpu()
            for number, pixels in enumerate(pictures):
                save(to_picture(pixels), output / f"{name}{f'_{number}' if len(pictures) > 1 else ''}.png")
    say(f"{len(files)} latents decoded to {output}")


def reconstruct(
    model: Model,
    images: Images,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("reconstructions"),
    resolution: Resolution = 256,
    memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Encode and decode images. Write each beside its reconstruction and error as one PNG.

    Example: vae reconstruct runs/first photos/ --output look
    """
    import torch

    from vae.data.contact_sheet import reconstruction_sheet
    from vae.data.transforms import center_crop, to_model_range, to_uint8

    allowed = bytes_named(memory)
    autoencoder = load(model, device)
    files = image_files(images)
    made = 0
    with progress("Reconstructing", 2 * len(files)) as advance, torch.no_grad():
        for name, _, pixels in opened(files, autoencoder.config.in_channels):
            image = center_crop(pixels, resolution)[None]
            posterior = encoded(autoencoder, to_model_range(image), allowed, advance)
            reconstruction = to_uint8(decoded(autoencoder, posterior.mode(), allowed, advance)).cpu()

            made += 1
            save(reconstruction_sheet(image, {"reconstruction": reconstruction}), output / f"{name}.png")

    say(f"{made} pictures in {output}")


def measure(
    model: Model,
    images: Images,
    write: Annotated[bool, typer.Option("--write", help="put the factors into the model's files")] = False,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="write latents_mean and latents_std, and scaling_factor 1")
    ] = False,
    resolution: Resolution = 256,
    device: Device = "auto",
) -> None:
    """Measure the mean and spread of a model's latents on images, and the scaling factor that follows.

    Example: vae measure runs/first photos/ --write
    """
    from vae.data.transforms import center_crop, to_model_range
    from vae.latents import measure_latents

    if per_channel and not write:
        raise InputError("--per-channel says what --write writes; give both")
    if write:
        check_writable(model)

    autoencoder = load(model, device)
    files = image_files(images)
    channels = autoencoder.config.in_channels
    place = place_of(autoencoder)
    measured = 0
    with progress("Measuring", len(files)) as advance:

        def batches() -> "Iterator[Tensor]":
            nonlocal measured
            for _, _, pixels in opened(files, channels):
                measured += 1
                yield to_model_range(center_crop(pixels, resolution))[None].to(place)
                advance(1)

        statistics = measure_latents(autoencoder, batches())

    print_statistics(statistics, measured, resolution)
    if write:
        write_factors(model, statistics, measured, per_channel=per_channel)
