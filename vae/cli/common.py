"""Helpers that the subcommands share: their options, and how they load a model and run it on images.

Options that several commands have are defined once here, as `Annotated` types. torch is imported inside functions, so
that `vae --help` is fast. A model encodes and decodes either whole or, with `--memory`, in strips within that bound.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from zlib import crc32

import typer

from vae.console import warn
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
Ema = Annotated[bool, typer.Option("--ema", help="take a training checkpoint's EMA weights")]
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

WEIGHTS = "an export, a weights file or a run"
IMAGES = {  # data.source: what is named by its root, and what that is called
    "folder": ("an existing one", "folder"),
    "list": ("a .txt, .csv or .jsonl list of images", "file"),
}
PHOTOS = "photos"  # in place of a folder: the photographs embedded in the installation
AUDITED = 2  # images; saturated and noisy images and latents of the prior are added
UNITS = {"MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}


def check_there(key: str, path: str | None, wanted: str, kind: str = "file or folder") -> None:
    """Raise InputError for a path that is not there, in words of its key. It costs no slow import."""
    if path is not None and not Path(path).expanduser().exists():
        raise InputError(f"{key}={path!r}: no such {kind}; name {wanted}")


def dtype_named(name: str | None) -> "torch.dtype | None":
    """Return the torch dtype of that name, or None for None. Raises InputError for any other name."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    require(name is None or name in dtypes, f"--dtype {name}", f"one of {list(dtypes)}")
    return None if name is None else dtypes[name]


def bytes_named(memory: str | None) -> int | None:
    """Return the bytes that `--memory` asks for, such as "2GB" or "500 MiB", or None without it.

    Raises InputError for anything but a number followed by one of `UNITS`.
    """
    if memory is None:
        return None
    number = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", memory.strip(), re.IGNORECASE)
    require(number is not None, f"--memory {memory}", "a number of MB, GB, MiB or GiB, as 500MB")
    assert number is not None
    return int(float(number[1]) * UNITS[number[2].upper()])


def read(
    model: Path, config: Path | None = None, family: str | None = None, *, ema: bool = False, finite: bool = True
) -> "LoadedWeights":
    """Read the weights that `model` points at: an export, a weights file, a full checkpoint or a run's directory.

    `config` is a config.json of diffusers that states the architecture. `family` states the scaling factor; InputError
    is raised where the network does not belong to that family. `ema` takes the EMA weights of a training checkpoint.
    `finite` refuses weights with NaN or infinite values.
    """
    from vae.weights import read_autoencoder
    from vae.weights.families import families_of
    from vae.weights.formats import read_config
    from vae.weights.load import find_export, which_export

    which = which_export(model)
    if which:
        warn(which, "note")

    stated = None if config is None else read_config(config)
    found = read_autoencoder(find_export(model), config=stated, ema=ema, finite=finite)
    if family is None:
        return found
    fitting = families_of(found.config)
    require(family in fitting, f"--family {family}", f"one of {fitting} for this network")
    return found.of_family(family)


def image_files(given: Sequence[Path], suffixes: Sequence[str] = ()) -> dict[str, Path]:
    """Return {label: file} of the given files, and of every image below the given folders.

    A label names the output that is made from the file. In a folder it keeps the path below that folder. `suffixes`
    selects other files than images. Raises InputError where two files would have the same label.
    """
    from vae.data.decode import EXTENSIONS
    from vae.data.sources import folder_files, in_words

    found: dict[str, Path] = {}
    for path in (path.expanduser() for path in given):
        others: list[str] = []
        names = folder_files(path, suffixes or EXTENSIONS, str(path), others) if path.is_dir() else [path.name]
        if others and not suffixes:
            warn(in_words(others, path), "note")
        for name in names:
            stem, dot, suffix = name.rpartition(".")

            # Images keep their suffix in the label, since a.png and a.jpg may both be there.
            with_suffix = f"{stem}_{suffix}" if dot else name
            label = stem if suffixes else with_suffix
            require(label not in found, f"two files are called {name}", "different names; give them in separate calls")
            found[label] = path / name if path.is_dir() else path

    return found


def opened(files: "dict[str, Path]", channels: int) -> "Iterator[tuple[str, Path, torch.Tensor]]":
    """Yield (label, file, uint8 pixels (C, H, W)) of each image. Images that cannot be read are skipped with a warning.

    Raises ImageError if the only file cannot be read, and InputError if none of several can.
    """
    from vae.data.decode import ImageError, open_image

    read, first = 0, None

    for name, path in files.items():
        try:
            pixels = open_image(path, channels)
        except ImageError as error:
            first = first or error
            if len(files) == 1:
                raise
            warn(f"skipped: {error}")
            continue

        read += 1
        yield name, path, pixels

    require(read > 0, f"none of {len(files)} images can be read ({first})", "one or more")


def audit_images(source: Path, config: "AutoencoderConfig", resolution: int) -> "list[torch.Tensor]":
    """Return a few central squares (1, C, H, W) in [-1, 1] for an audit.

    `source` is an image, a folder of images, or "photos" for the photographs embedded in the installation. At most
    `AUDITED` images are chosen, by the hash of their names.
    """
    from vae.data.decode import open_image
    from vae.data.sources import TRAINING_PHOTOS, Names, Photos, fewest_by_hash
    from vae.data.transforms import center_crop, to_model_range

    if str(source) == PHOTOS and not source.exists():
        embedded = Photos(TRAINING_PHOTOS)
        files = {name: embedded.root / name for name in embedded.names}
    else:
        files = image_files([source])

    # The choice depends on names alone, so that the same folder gives the same audit everywhere.
    paths = list(files.values())
    pictures = [open_image(paths[i], config.in_channels) for i in fewest_by_hash(Names(files), AUDITED)]
    return [to_model_range(center_crop(picture, resolution))[None] for picture in pictures]


Advance = Callable[[float], object]
Made = TypeVar("Made")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Put the file's path before the message of every InputError raised within the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def place_of(autoencoder: "Autoencoder") -> "torch.device":
    """Return the device of the autoencoder's weights."""
    return next(autoencoder.parameters()).device


def raw_latents(path: Path, config: "AutoencoderConfig", family: str | None) -> "Tensor":
    """Read the latents (B, C, h, w) of a file, and return them as the autoencoder of `config` takes them.

    A KL autoencoder takes raw latents, a tiny one takes scaled latents.

    Scaled latents are unscaled with the factors that their file states, whatever the reader's own factors are. If an
    autoencoder of the other architecture made them, the reader's own factors are used instead: what both architectures
    share is the scaled latents that a diffusion model sees. Raw latents come from a KL autoencoder. For a tiny reader
    they are scaled with the factors of `family` if it is given, else with those that their file states.

    Raises InputError where the scale is needed and neither the file nor `family` tells it.
    """
    from vae.config.model import AutoencoderConfig
    from vae.latents import latents_for, unscale_latents
    from vae.weights.families import FAMILIES
    from vae.weights.latent_files import read_latents, scale_in

    latents, scaled = read_latents(path, config.latent_channels)
    if scaled:
        stated = scale_in(path, config.latent_channels)
        scale = config if stated is None or stated.latents_are_scaled != config.latents_are_scaled else stated
        unknown = f"{path}: scaled latents, and a model that does not tell its scale"
        require(scale.scale_is_known, unknown, "--family with them: sd, sdxl, sd3 or flux")
        return unscale_latents(latents, scale)

    # Raw latents are what a KL autoencoder takes. A tiny one needs the scale of the model that made them.
    if not config.latents_are_scaled:
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
    """Encode images (1, C, H, W) in [-1, 1], and return their posterior.

    With `memory` in bytes the work is done in strips within that bound. `advance` is called with amounts that add up to
    1.
    """
    from vae.models.strips import encode_in_strips

    if memory is not None:
        return encode_in_strips(autoencoder, images, memory, advance)
    return _whole(autoencoder.encode, autoencoder, images, advance)


def decoded(autoencoder: "Autoencoder", latents: "Tensor", memory: int | None, advance: Advance) -> "Tensor":
    """Decode raw latents (B, C, h, w) to images (B, C, H, W), with `memory` and `advance` as in `encoded`."""
    from vae.models.strips import decode_in_strips

    if memory is not None:
        return decode_in_strips(autoencoder, latents, memory, advance)
    return _whole(autoencoder.decode, autoencoder, latents, advance)


def _whole(half: "Callable[[Tensor], Made]", autoencoder: "Autoencoder", given: "Tensor", advance: Advance) -> "Made":
    """Apply the encoder or decoder to the whole input on the model's device, and advance by 1."""
    made = half(given.to(place_of(autoencoder)))
    advance(1)
    return made


Seed = Annotated[int, typer.Option(min=0, help="of all that is drawn: the same seed draws the same")]

WIDEST = 8  # pictures to a row


def load(model: Path, device: str, family: str | None = None) -> "Autoencoder":
    """Load the autoencoder that `model` points at onto `device`, which is auto, cpu, cuda or cuda:N."""
    from vae.evaluation.measure import find_device

    return read(model, family=family).build().to(find_device(device))


def save(picture: "Image.Image", target: Path) -> None:
    """Write a picture as PNG. The file appears under its name only when it is complete."""
    from vae.files import replacing

    with replacing(target) as partial:
        picture.save(partial, format="PNG")


def squares(files: dict[str, Path], autoencoder: "Autoencoder", resolution: int) -> "Iterator[tuple[str, Tensor]]":
    """Yield (label, central square) of each readable file.

    A square is (C, resolution, resolution) in [-1, 1] on the model's device.
    """
    from vae.data.transforms import center_crop, to_model_range

    for name, _, pixels in opened(files, autoencoder.config.in_channels):
        yield name, to_model_range(center_crop(pixels, resolution)).to(place_of(autoencoder))


def shown(images: "Tensor") -> "Tensor":
    """Convert images in about [-1, 1] on any device to uint8 on the CPU, as contact sheets take them."""
    from vae.data.transforms import to_uint8

    return to_uint8(images).cpu()


def generator_of(seed: int, name: str) -> "torch.Generator":
    """Return a random generator for one image, seeded by `seed` and the image's label.

    Each image has its own, so that its noise does not depend on which other images are there.
    """
    import torch

    from vae.data.sampler import seed_for

    return torch.Generator().manual_seed(seed_for(seed, crc32(name.encode("utf-8", "surrogateescape"))))


def rows_of(count: int) -> list[slice]:
    """Divide `count` pictures into rows of at most `WIDEST`, as slices."""
    return [slice(start, min(start + WIDEST, count)) for start in range(0, count, WIDEST)]
