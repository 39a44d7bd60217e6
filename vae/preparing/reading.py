"""Images read one by one, those that cannot be used set aside."""

import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae.data.images import open_image
from vae.data.limits import ImageError, machine_apart
from vae.data.sources import Source
from vae.data.transforms import center_crop
from vae.errors import InputError

UNREADABLE = "unreadable"
ADDRESS = re.compile(r" object at 0x[0-9a-f]+")  # of Pillow's messages: another one each time


class Dropped(NamedTuple):
    """An image that is left out: its number in the source, the kind of reason, and the whole of it."""

    number: int
    name: str
    why: str
    message: str


def unreadable(source: Source, number: int, error: ImageError) -> Dropped:
    """The reason is the same wherever the source lies and however often it is read."""
    name = source.names[number]
    message = ADDRESS.sub("", str(error).replace(source.label(number), name))
    return Dropped(number, name, UNREADABLE, message)


class Square(NamedTuple):
    """uint8 (C, resolution, resolution); `is_enlarged` where the image had fewer."""

    number: int
    name: str
    pixels: Tensor
    is_enlarged: bool


class Read(NamedTuple):
    """`images` uint8 (B, C, H, W) with their numbers and names; `enlarged` of them had fewer pixels."""

    images: Tensor
    numbers: list[int]
    names: list[str]
    enlarged: int
    dropped: list[Dropped]


Result = Square | Dropped | InputError  # an error is a value until it has left the worker


class Squares(Dataset[Result]):
    """number -> the image's central square, or why there is none."""

    def __init__(self, source: Source, resolution: int, channels: int) -> None:
        self.source, self.resolution, self.channels = source, resolution, channels

    def __getitem__(self, number: int) -> Result:
        name = self.source.names[number]
        try:
            with machine_apart(name):
                pixels = open_image(self.source.read(number), self.channels, name=name)
        except ImageError as error:
            return unreadable(self.source, number, error)
        except InputError as error:
            return error
        return Square(number, name, center_crop(pixels, self.resolution), min(pixels.shape[1:]) < self.resolution)


def collate(results: list[Result]) -> Read | InputError:
    error = next((one for one in results if isinstance(one, InputError)), None)
    if error is not None:
        return error
    squares = [one for one in results if isinstance(one, Square)]
    images = torch.stack([one.pixels for one in squares]) if squares else torch.empty(0, dtype=torch.uint8)
    enlarged = sum(one.is_enlarged for one in squares)
    dropped = [one for one in results if isinstance(one, Dropped)]
    return Read(images, [one.number for one in squares], [one.name for one in squares], enlarged, dropped)
