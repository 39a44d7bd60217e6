"""What commands share that run a model on images: the model loaded, squares in, pictures and tables out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zlib import crc32

import typer
from rich.console import Console
from rich.table import Table

from vae.cli.common import opened, read
from vae.cli.running import place_of

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from vae.models.interface import Autoencoder

Seed = Annotated[int, typer.Option(min=0, help="of all that is drawn: the same seed draws the same")]

WIDEST = 8  # pictures to a row


def load(model: Path, device: str, family: str | None = None) -> "Autoencoder":
    from vae.evaluation.models import find_device

    return read(model, family=family).build().to(find_device(device))


def save(picture: "Image.Image", target: Path) -> None:
    from vae.checkpoints.safe import replacing

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

    from vae.data.order import seed_for

    return torch.Generator().manual_seed(seed_for(seed, crc32(name.encode("utf-8", "surrogateescape"))))


def rows_of(count: int) -> list[slice]:
    """`count` pictures in rows."""
    return [slice(start, min(start + WIDEST, count)) for start in range(0, count, WIDEST)]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
