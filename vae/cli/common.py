"""What several subcommands share: their arguments, and how they speak. torch is imported only when there is work."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vae.errors import require

if TYPE_CHECKING:
    import torch

    from vae.checkpoints import Found
    from vae.models.autoencoder import AutoencoderConfig

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
) -> "Found":
    """The weights that `model` means; `family` states the scaling factor."""
    from vae.checkpoints import read_autoencoder
    from vae.checkpoints.diffusers import read_config
    from vae.checkpoints.exports import find_export
    from vae.checkpoints.families import families_of

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
    from vae.data.images import EXTENSIONS
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
    from vae.data.images import open_image
    from vae.data.limits import ImageError

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
    from vae.data.images import open_image
    from vae.data.names import Names, fewest_by_hash
    from vae.data.sources import TRAINING_PHOTOS, Photos
    from vae.data.transforms import center_crop, to_model_range

    if str(source) == PHOTOS and not source.exists():
        embedded = Photos(TRAINING_PHOTOS)
        files = {name: embedded.root / name for name in embedded.names}
    else:
        files = image_files([source])
    paths = list(files.values())
    pictures = [open_image(paths[i], config.in_channels) for i in fewest_by_hash(Names(files), AUDITED)]
    return [to_model_range(center_crop(picture, resolution))[None] for picture in pictures]
