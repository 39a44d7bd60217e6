"""Subcommands that run a model on images and latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zlib import crc32

import typer

from vae.cli.common import (
    Device,
    Dtype,
    Family,
    Images,
    Memory,
    Model,
    Resolution,
    bytes_named,
    dtype_named,
    image_files,
    opened,
    progress,
    say,
    warn,
)
from vae.cli.running import about, decoded, encoded, place_of, raw_latents
from vae.cli.sheets import load, save
from vae.errors import InputError, require

if TYPE_CHECKING:
    from torch import Tensor

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
    """Encode images to .latent files (safetensors); raw ones open in ComfyUI's LoadLatent too.

    Example: vae encode runs/first photos/ --output latents
    """
    import torch

    from vae.checkpoints.latentfile import SUFFIX, write_latents
    from vae.data.order import seed_for
    from vae.data.transforms import center_crop, crop_to_multiple, to_model_range
    from vae.latents import scale_latents

    precision, allowed, autoencoder = dtype_named(dtype), bytes_named(memory), load(model, device, family)
    config = autoencoder.config
    scaled = scaled or config.architecture == "tiny"  # there are no others
    unknown = f"--scaled, and {model} does not tell its scaling factor"
    require(config.scale_is_known or not scaled, unknown, "--family with it, or raw latents")
    if not config.scale_is_known:
        warn(f"{model} does not tell its scaling factor: none is written beside the latents; --family says it")
    drawn = "mean" if sample is None else f"sample, seed {sample}"
    files, made = image_files(images), 0
    with progress("Encoding", len(files)) as advance, torch.no_grad():
        for name, path, image in opened(files, config.in_channels):
            factor = config.downsample_factor
            pixels = center_crop(image, resolution) if resolution else crop_to_multiple(image, factor, path)
            with about(path):
                posterior = encoded(autoencoder, to_model_range(pixels)[None], allowed, advance)
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

    A tiny model decodes those of a KL one too, for a look at them: by the scale that they state, or of --family.

    Example: vae decode runs/first latents/ --output decoded
    """
    import torch

    from vae.checkpoints.latentfile import SUFFIX
    from vae.data.pictures import to_picture
    from vae.data.transforms import to_uint8

    allowed, autoencoder = bytes_named(memory), load(model, device, family)
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
    """Encode and decode images; write each beside its reconstruction and error as one PNG.

    Example: vae reconstruct runs/first photos/ --output look
    """
    import torch

    from vae.data.pictures import reconstruction_sheet
    from vae.data.transforms import center_crop, to_model_range, to_uint8

    allowed, autoencoder = bytes_named(memory), load(model, device)
    files, made = image_files(images), 0
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
    """Measure mean and spread of a model's latents on images, and the scaling factor that follows.

    Example: vae measure runs/first photos/ --write
    """
    from vae.cli.measuring import check_writable, print_statistics, write_factors
    from vae.data.transforms import center_crop, to_model_range
    from vae.latents import measure_latents

    if per_channel and not write:
        raise InputError("--per-channel says what --write writes; give both")
    if write:
        check_writable(model)
    autoencoder, files = load(model, device), image_files(images)
    channels, place = autoencoder.config.in_channels, place_of(autoencoder)
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
