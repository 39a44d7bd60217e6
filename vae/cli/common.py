"""What several subcommands share: their arguments, and how they speak. torch is imported only when there is work.

A model run as a command asks: whole, or in strips within a bound of memory.

What commands share that run a model on images: the model loaded, squares in, pictures and tables out."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from zlib import crc32

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vae.errors import InputError, require

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from vae.config.model import AutoencoderConfig
    from vae.models.base import Autoencoder
    from vae.models.posterior import DiagonalGaussian
    from vae.weights.loaded import LoadedWeights


Model = Annotated[Path, typer.Argument(help="an export, a weights file, a full checkpoint, or the directory of a run")]
Images = Annotated[list[Path], typer.Argument(help="image files or folders of them")]
Target = Annotated[Path, typer.Argument(help="NAME.safetensors for one file (web UIs), else a diffusers folder")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")]
Ema = Annotated[bool, typer.Option("--ema", help="take a training checkpoint's averaged weights")]
Config = Annotated[Path | None, typer.Option(help="a config.json of diffusers that states the architecture")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Family = Annotated[str | None, typer.Option(help="sd, sdxl, x4, sd3 or flux, where the file does not tell")]
Resolution = Annotated[int, typer.Option(min=1, help="side in pixels of the square that is cut from each image")]
Base = Annotated[Path | None, typer.Option(help="the autoencoder whose latents must be kept: say how far they moved")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="encode and decode in strips within this much, as 2GB or 500MB: slower, the results are the same"
    ),
]

PHOTOS = "photos"  # instead of a folder: the embedded photographs
AUDITED = 2  # images; saturated and noisy ones and latents of the prior come on top
UNITS = {"MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}


def say(line: str = "") -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    Console(stderr=True).print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True, style="yellow")


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[float], object]]:
    """Gives `advance(amount)`; the bar goes to stderr and is gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def dtype_named(name: str | None) -> "torch.dtype | None":
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    require(name is None or name in dtypes, f"--dtype {name}", f"one of {list(dtypes)}")
    return None if name is None else dtypes[name]


def bytes_named(memory: str | None) -> int | None:
    """Of --memory."""
    if memory is None:
        return None
    number = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", memory.strip(), re.IGNORECASE)
    require(number is not None, f"--memory {memory}", "a number of MB, GB, MiB or GiB, as 500MB")
    assert number is not None
    return int(float(number[1]) * UNITS[number[2].upper()])


def read(
    model: Path, config: Path | None = None, family: str | None = None, *, ema: bool = False, finite: bool = True
) -> "LoadedWeights":
    """The weights that `model` means; `family` states the scaling factor."""
    from vae.weights import read_autoencoder
    from vae.weights.diffusers import read_config
    from vae.weights.families import families_of
    from vae.weights.load import find_export

    stated = None if config is None else read_config(config)
    found = read_autoencoder(find_export(model), config=stated, ema=ema, finite=finite)
    if family is None:
        return found
    fitting = families_of(found.config)
    require(family in fitting, f"--family {family}", f"one of {fitting} for this network")
    return found.of_family(family)


def image_files(given: Sequence[Path], suffixes: Sequence[str] = ()) -> dict[str, Path]:
    """{name for what is made of it: file}: files as given, folders with everything below them, in their structure.

    `suffixes` other than images' may be asked for.
    """
    from vae.data.decode import EXTENSIONS
    from vae.data.sources import folder_files

    found: dict[str, Path] = {}
    for path in (path.expanduser() for path in given):
        names = folder_files(path, suffixes or EXTENSIONS, str(path)) if path.is_dir() else [path.name]
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            label = stem if suffixes else f"{stem}_{suffix}" if dot else name
            require(label not in found, f"two files are called {name}", "different names; give them in separate calls")
            found[label] = path / name if path.is_dir() else path
    return found


def opened(files: "dict[str, Path]", channels: int) -> "Iterator[tuple[str, Path, torch.Tensor]]":
    """(name, file, pixels) of each; those that cannot be read are left out with a warning."""
    from vae.data.decode import ImageError, open_image

    read, first = 0, None
    for name, path in files.items():
        try:
            pixels = open_image(path, channels)
        except ImageError as error:
            first = first or error
            if len(files) == 1:
                raise
            warn(f"left out: {error}")
            continue
        read += 1
        yield name, path, pixels
    require(read > 0, f"none of {len(files)} images can be read ({first})", "one or more")


def audit_images(source: Path, config: "AutoencoderConfig", resolution: int) -> "list[torch.Tensor]":
    """A few central squares (1, C, H, W) in [-1, 1] of a file, a folder, or of the embedded photographs."""
    from vae.data.decode import open_image
    from vae.data.sources import TRAINING_PHOTOS, Names, Photos, fewest_by_hash
    from vae.data.transforms import center_crop, to_model_range

    if str(source) == PHOTOS and not source.exists():
        embedded = Photos(TRAINING_PHOTOS)
        files = {name: embedded.root / name for name in embedded.names}
    else:
        files = image_files([source])
    paths = list(files.values())
    pictures = [open_image(paths[i], config.in_channels) for i in fewest_by_hash(Names(files), AUDITED)]
    return [to_model_range(center_crop(picture, resolution))[None] for picture in pictures]


Advance = Callable[[float], object]
Made = TypeVar("Made")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Errors within the block are about this file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def place_of(autoencoder: "Autoencoder") -> "torch.device":
    return next(autoencoder.parameters()).device


def raw_latents(path: Path, config: "AutoencoderConfig", family: str | None) -> "Tensor":
    """Those in a file (B, C, h, w), as the autoencoder of `config` takes them.

    Scaled ones were scaled by the factors that their file states, whatever those of the reader are; what the other
    architecture made is unscaled by the reader's own, for both are those that a diffusion model sees. A tiny one takes
    scaled latents: raw ones, which are a KL autoencoder's, are scaled by the factors of the `family` that is named,
    else by those that their file states.
    """
    from vae.config.model import AutoencoderConfig
    from vae.latents import latents_for, unscale_latents
    from vae.weights.families import FAMILIES
    from vae.weights.latent_files import read_latents, scale_in

    latents, scaled = read_latents(path, config.latent_channels)
    if scaled:
        stated = scale_in(path, config.latent_channels)
        scale = config if stated is None or stated.architecture != config.architecture else stated
        unknown = f"{path}: scaled latents, and a model that does not tell its scale"
        require(scale.scale_is_known, unknown, "--family with them: sd, sdxl, sd3 or flux")
        return unscale_latents(latents, scale)
    if config.architecture == "kl":
        return latents
    if family is not None:
        scaling, shift = FAMILIES[family]
        maker = AutoencoderConfig(latent_channels=config.latent_channels, scaling_factor=scaling, shift_factor=shift)
        return latents_for(config, latents, maker)
    maker = scale_in(path, config.latent_channels)
    remedy = "--family with it: sd, sdxl, sd3 or flux"
    require(maker is not None, f"{path}: raw latents that do not tell their scale", remedy)
    assert maker is not None
    return latents_for(config, latents, maker)


def encoded(autoencoder: "Autoencoder", images: "Tensor", memory: int | None, advance: Advance) -> "DiagonalGaussian":
    """Posterior of images (1, C, H, W), within `memory` bytes if any are given; `advance` by 1 in all."""
    from vae.models.strips import encode_in_strips

    if memory is not None:
        return encode_in_strips(autoencoder, images, memory, advance)
    return _whole(autoencoder.encode, autoencoder, images, advance)


def decoded(autoencoder: "Autoencoder", latents: "Tensor", memory: int | None, advance: Advance) -> "Tensor":
    """Images of raw latents (B, C, h, w), as `encoded`."""
    from vae.models.strips import decode_in_strips

    if memory is not None:
        return decode_in_strips(autoencoder, latents, memory, advance)
    return _whole(autoencoder.decode, autoencoder, latents, advance)


def _whole(half: "Callable[[Tensor], Made]", autoencoder: "Autoencoder", given: "Tensor", advance: Advance) -> "Made":
    made = half(given.to(place_of(autoencoder)))
    advance(1)
    return made


Seed = Annotated[int, typer.Option(min=0, help="of all that is drawn: the same seed draws the same")]

WIDEST = 8  # pictures to a row


def load(model: Path, device: str, family: str | None = None) -> "Autoencoder":
    from vae.evaluation.measure import find_device

    return read(model, family=family).build().to(find_device(device))


def save(picture: "Image.Image", target: Path) -> None:
    from vae.files import replacing

    with replacing(target) as partial:
        picture.save(partial, format="PNG")


def squares(files: dict[str, Path], autoencoder: "Autoencoder", resolution: int) -> "Iterator[tuple[str, Tensor]]":
    """(name, central square (C, resolution, resolution) in [-1, 1] on the model's device) of each file."""
    from vae.data.transforms import center_crop, to_model_range

    for name, _, pixels in opened(files, autoencoder.config.in_channels):
        yield name, to_model_range(center_crop(pixels, resolution)).to(place_of(autoencoder))


def shown(images: "Tensor") -> "Tensor":
    """Images about [-1, 1], anywhere -> uint8 on the CPU, as sheets have them."""
    from vae.data.transforms import to_uint8

    return to_uint8(images).cpu()


def generator_of(seed: int, name: str) -> "torch.Generator":
    """Of its own for each image, so that none depends on which others there are."""
    import torch

    from vae.data.sampler import seed_for

    return torch.Generator().manual_seed(seed_for(seed, crc32(name.encode("utf-8", "surrogateescape"))))


def rows_of(count: int) -> list[slice]:
    """`count` pictures in rows."""
    return [slice(start, min(start + WIDEST, count)) for start in range(0, count, WIDEST)]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
