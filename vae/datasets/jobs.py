"""Jobs that make many shards: each shard is a function of the source, a recipe and its number, and of nothing else.

A folder holds recipe.json, the shards NNNNNN.*, and beside each its receipt NNNNNN.json. Once all shards are there, it
also holds dropped.jsonl and index.json. Work that was killed continues with the shards that have no receipt. Whichever
process finds all of them finished writes the last two files.

The first part reads images one by one and sets aside those that cannot be used.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae.data.decode import ImageError, open_image, reraise_machine_errors
from vae.data.shards import DROPPED, INDEX
from vae.data.sources import Source
from vae.data.transforms import center_crop
from vae.distributed import Place
from vae.errors import InputError, require
from vae.files import WeightsError, replacing, write_text

UNREADABLE = "unreadable"
ADDRESS = re.compile(r" object at 0x[0-9a-f]+")  # in Pillow's messages; it differs each time


class Dropped(NamedTuple):
    """An image that is skipped: its number and name in the source, the kind of reason, and the whole message."""

    number: int
    name: str
    why: str
    message: str


def unreadable(source: Source, number: int, error: ImageError) -> Dropped:
    """Return an image that cannot be read as `Dropped`.

    Its message is the same wherever the source lies and however often it is read: paths become names, and memory
    addresses are removed.
    """
    name = source.names[number]
    message = ADDRESS.sub("", str(error).replace(source.label(number), name))
    return Dropped(number, name, UNREADABLE, message)


class Square(NamedTuple):
    """The central square of an image, uint8 (C, resolution, resolution).

    `is_enlarged` is set where the image's shorter side had fewer pixels.
    """

    number: int
    name: str
    pixels: Tensor
    is_enlarged: bool


class Read(NamedTuple):
    """A batch of squares: `images` uint8 (B, C, H, W) with their numbers and names.

    `enlarged` of them had fewer pixels on the shorter side. `dropped` are those that could not be read.
    """

    images: Tensor
    numbers: list[int]
    names: list[str]
    enlarged: int
    dropped: list[Dropped]


Result = Square | Dropped | InputError  # a worker returns an error as a value, so that its message stays as it is


class Squares(Dataset[Result]):
    """A data set of central squares: `dataset[number]` is the square, or why there is none."""

    def __init__(self, source: Source, resolution: int, channels: int) -> None:
        self.source = source
        self.resolution = resolution
        self.channels = channels

    def __getitem__(self, number: int) -> Result:
        name = self.source.names[number]
        try:
            with reraise_machine_errors(name):
                pixels = open_image(self.source.read(number), self.channels, name=name)
        except ImageError as error:
            return unreadable(self.source, number, error)
        except InputError as error:
            return error
        return Square(number, name, center_crop(pixels, self.resolution), min(pixels.shape[1:]) < self.resolution)


def collate(results: list[Result]) -> Read | InputError:
    """Collate results into a batch. If one of them is an InputError, return the first of these instead."""
    error = next((one for one in results if isinstance(one, InputError)), None)
    if error is not None:
        return error

    squares = [one for one in results if isinstance(one, Square)]
    images = torch.stack([one.pixels for one in squares]) if squares else torch.empty(0, dtype=torch.uint8)
    enlarged = sum(one.is_enlarged for one in squares)
    dropped = [one for one in results if isinstance(one, Dropped)]
    return Read(images, [one.number for one in squares], [one.name for one in squares], enlarged, dropped)


RECIPE = "recipe.json"
ALWAYS_ALLOWED = 10  # this many unreadable images of a shard, however small it is
MOST_TOLD = 4  # differences that a refusal lists
TRIES = 3  # at writing a file that another machine may be writing too

Json = dict[str, Any]


class Made(NamedTuple):
    """A shard's images: how many are in it, which were dropped, and other counts to report."""

    images: int
    dropped: list[Dropped]
    counts: dict[str, int]


@dataclass(frozen=True)
class Job:
    """A folder of shards to be made.

    `options` decide the bytes of the shards, together with the images of `source` and how many belong to each shard.
    The work stops at a shard of which more than `max_corrupt` of the images, and more than ten, cannot be read.
    """

    folder: Path
    suffix: str
    source: Source
    options: Json
    shard_images: int = 1000
    max_corrupt: float = 0.1

    def __post_init__(self) -> None:
        require(self.shard_images >= 1, f"--shard-images {self.shard_images}", "1 or more")
        require(0 <= self.max_corrupt <= 1, f"--max-corrupt {self.max_corrupt}", "a share from 0 to 1")
        require(len(self.source) > 0, "no images", "at least one")

    @cached_property
    def recipe(self) -> Json:
        """Everything that decides the bytes of the shards, as JSON."""
        images = {"source": self.source.fingerprint(), "images": len(self.source)}
        return images | {"shard_images": self.shard_images} | self.options

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self.source) // self.shard_images)

    def numbers(self, shard: int) -> range:
        """Return the numbers of the source's images that belong to a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, len(self.source)))

    def file(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"{shard:06d}{self.suffix}"


def begin(job: Job) -> None:
    """Write the recipe into a new folder, or check that the folder has the same one.

    Raises InputError where the folder was begun with another recipe, naming what differs, and where it holds other
    files that would be lost.
    """
    file = job.folder / RECIPE
    if not file.exists():
        taken = [*sorted(job.folder.glob(f"*{job.suffix}")), *job.folder.glob(INDEX)]
        if taken:
            raise InputError(f"{job.folder}: holds {taken[0].name}, which would be lost; choose another folder")
        _write_alike(file, _text(job.recipe))

    before = _flat(_read(file) or {})
    now = _flat(json.loads(_text(job.recipe)))
    told = [
        "other images (some were added, removed or renamed)" if key == "source" else f"{key} {before.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]

    if told:
        given = f"{job.folder}: begun with {', '.join(told[:MOST_TOLD])}"
        raise InputError(f"{given}; give what it was begun with, or another folder")


def unfinished(job: Job, place: Place) -> list[int]:
    """Return this process's shards that have no valid receipt."""
    return [shard for shard in range(place.rank, job.shards, place.world) if receipt(job, shard) is None]


def receipt(job: Job, shard: int) -> Json | None:
    """Return the receipt of a finished shard.

    None where the shard is missing, belongs to another recipe, or has not the size that was written.
    """
    found = _read(job.file(shard).with_suffix(".json"))
    file = job.file(shard)
    if found is None or found.get("recipe") != job.digest or not file.is_file():
        return None
    return found if file.stat().st_size == found["bytes"] else None


def make(job: Job, shard: int, write: Callable[[Path], Made]) -> None:
    """Make a shard: `write` fills the file that it is given.

    The receipt is written last. Only with it is the shard finished.
    """
    file = job.file(shard)
    with replacing(file) as partial:
        made = write(partial)
        _check_corrupt(job, shard, made)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = written.tell()

    described = {"name": file.name, "images": made.images, "bytes": size, "sha256": digest, "counts": made.counts}
    dropped = [one._asdict() for one in made.dropped]
    write_text(file.with_suffix(".json"), _text({"recipe": job.digest, **described, "dropped": dropped}))


def conclude(job: Job) -> Json | None:
    """Return the index, and write it if it is not there. None while shards are missing."""
    receipts = []
    for shard in range(job.shards):
        found = receipt(job, shard)
        if found is None:
            return None
        receipts.append(found)

    dropped = [one for found in receipts for one in found["dropped"]]
    shards = [{key: found[key] for key in ("name", "images", "bytes", "sha256")} for found in receipts]
    index = {
        "images": sum(found["images"] for found in receipts),
        "bytes": sum(found["bytes"] for found in receipts),
        "dropped": _counted(one["why"] for one in dropped),
        "counts": {key: sum(found["counts"][key] for found in receipts) for key in receipts[0]["counts"]},
        "recipe": job.recipe,
        "shards": shards,
    }

    _write_alike(job.folder / DROPPED, "".join(f"{json.dumps(one)}\n" for one in dropped))
    _write_alike(job.folder / INDEX, _text(index))
    return index


def _check_corrupt(job: Job, shard: int, made: Made) -> None:
    """Raise InputError where too many of a shard's images cannot be read."""
    corrupt = [one for one in made.dropped if one.why == UNREADABLE]
    numbers = job.numbers(shard)
    if len(corrupt) > max(ALWAYS_ALLOWED, job.max_corrupt * len(numbers)):
        told = f"{len(corrupt)} of the images {numbers[0]} to {numbers[-1]} cannot be read, the first: "
        remedy = "is everything still mounted? --max-corrupt 1 leaves out any number"
        raise InputError(f"{told}{corrupt[0].message.rpartition(';')[0]}; {remedy}")


def _counted(reasons: Iterator[str]) -> dict[str, int]:
    """Return {reason: how often}, sorted by reason."""
    counts: dict[str, int] = {}
    for why in reasons:
        counts[why] = counts.get(why, 0) + 1
    return dict(sorted(counts.items()))


def _write_alike(file: Path, text: str) -> None:
    """Write a text that other processes, on this machine or others, may be writing at the same time.

    All of them write the same, so it is enough that the file has it.
    """
    for attempt in range(TRIES):
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return
        try:
            write_text(file, text)
        except WeightsError:
            if attempt == TRIES - 1:
                raise


def _text(value: Json) -> str:
    """Return JSON as it is written to files."""
    return json.dumps(value, indent=1) + "\n"


def _read(file: Path) -> Json | None:
    """Return the object in a JSON file, or None where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _flat(values: Json, prefix: str = "") -> Json:
    """Flatten {"config": {"scaling_factor": ...}} to {"config.scaling_factor": ...}."""
    flat: Json = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
