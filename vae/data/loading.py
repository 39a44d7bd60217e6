"""From a DataConfig to batches of uint8 images."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vae.data.order import EndlessSampler, seed_for
from vae.data.sources import (
    TRAINING_PHOTOS,
    VALIDATION_PHOTOS,
    ImageFiles,
    Photos,
    fewest_by_hash,
    folder_images,
    split_by_hash,
)
from vae.data.transforms import center_crop, random_crop
from vae.errors import require


@dataclass
class DataConfig:
    """`source` "photos" is embedded and needs nothing; "folder" reads `root`, validates on `validation_root` or on a
    share of `root`.

    `crop_scale`: side of the random training crops as a share of the short side, resized to `resolution`.
    """

    source: str = "folder"
    root: str | None = None
    validation_root: str | None = None
    validation_fraction: float = 0.02
    validation_images: int | None = 256
    resolution: int = 256
    batch_size: int = 4
    validation_batch_size: int = 8
    workers: int = 4
    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    flip: bool = True

    def __post_init__(self) -> None:
        require(self.source in SOURCES, f"data.source={self.source!r}", f"one of {sorted(SOURCES)}")
        if self.source == "folder":
            require(self.root is not None, "data.root is not set", "a folder of images, e.g. data.root=photos")
        else:
            unused = self.root is None and self.validation_root is None
            require(unused, f"data.root={self.root!r} with data.source={self.source!r}", "data=folder to read a folder")
        for name in ("resolution", "batch_size", "validation_batch_size"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}", "1 or more")
        limit = self.validation_images
        require(limit is None or limit >= 1, f"data.validation_images={limit}", "1 or more, or null for all")
        require(self.workers >= 0, f"data.workers={self.workers}", "0 or more")
        fraction, scale = self.validation_fraction, self.crop_scale
        require(0 < fraction <= 1, f"data.validation_fraction={fraction}", "above 0 and at most 1")
        ordered = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        require(ordered, f"data.crop_scale={scale}", "[low, high] with 0 < low <= high <= 1")


class Batch(NamedTuple):
    """`images` uint8 (B, C, H, W); `positions`: sample positions in training, indices in validation.

    Positions are plain integers, so that reading them never waits for a GPU.
    """

    images: Tensor
    positions: list[int]


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """(position, index) -> the image at `index`, cropped and flipped as `position` decides."""

    def __init__(self, source: Sequence[Image.Image], config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        position, index = key
        low, high = self.config.crop_scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, position))
            return random_crop(self.source[index], self.config.resolution, (low, high), flip=self.config.flip), position


class HeldOutImages(Dataset[tuple[Tensor, int]]):
    """index -> the image's central square."""

    def __init__(self, source: Sequence[Image.Image], resolution: int) -> None:
        self.source, self.resolution = source, resolution

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return center_crop(self.source[index], self.resolution), index


def open_sources(config: DataConfig, channels: int) -> tuple[ImageFiles, ImageFiles]:
    """(training, validation) images of a data configuration."""
    training, validation = SOURCES[config.source](config, channels)
    validation.names = fewest_by_hash(validation.names, config.validation_images)
    return training, validation


def training_loader(source: ImageFiles, config: DataConfig, seed: int, sampler: EndlessSampler) -> DataLoader[Batch]:
    """An endless loader in the order of `sampler`."""
    return _loader(TrainingImages(source, config, seed), config, batch_size=config.batch_size, sampler=sampler)


def validation_loader(source: ImageFiles, config: DataConfig, rank: int, world_size: int) -> DataLoader[Batch]:
    """This rank's share, in order and without padding: no image is ever counted twice."""
    share = Subset(HeldOutImages(source, config.resolution), range(rank, len(source), world_size))
    return _loader(share, config, batch_size=config.validation_batch_size, sampler=None)


def _photos(_: DataConfig, channels: int) -> tuple[ImageFiles, ImageFiles]:
    return Photos(TRAINING_PHOTOS, channels), Photos(VALIDATION_PHOTOS, channels)


def _folder(config: DataConfig, channels: int) -> tuple[ImageFiles, ImageFiles]:
    assert config.root is not None
    if config.validation_root is not None:
        held_out = ImageFiles.below(config.validation_root, channels, key="data.validation_root")
        return ImageFiles.below(config.root, channels), held_out
    training, validation = split_by_hash(folder_images(config.root), config.validation_fraction)
    root = Path(config.root).expanduser()
    return ImageFiles(root, training, channels), ImageFiles(root, validation, channels)


SOURCES = {"photos": _photos, "folder": _folder}


def _collate(samples: list[tuple[Tensor, int]]) -> Batch:
    images, positions = zip(*samples, strict=True)
    return Batch(torch.stack(images), list(positions))


def shut_down(loader: DataLoader[Batch]) -> None:
    """End the loader's workers now: after an error the interpreter's exit would wait for them."""
    iterator = getattr(loader, "_iterator", None)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def _outlive_signals(_: int) -> None:
    """A signal to the group reaches the workers too, but their process may have an update to finish with them.

    So they ignore all but SIGTERM, and that one for a minute.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def _loader(
    dataset: Dataset[tuple[Tensor, int]], config: DataConfig, batch_size: int, sampler: EndlessSampler | None
) -> DataLoader[Batch]:
    return DataLoader(
        cast(Dataset[Batch], dataset),  # what collate makes of its samples
        batch_size=batch_size,
        sampler=sampler,
        num_workers=config.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.workers > 0,
        generator=torch.Generator(),  # else every iteration draws from the global one
        worker_init_fn=_outlive_signals,
    )
