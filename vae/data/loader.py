"""Loading: from a source to batches of pixels, decoded, cut and collated by worker processes."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, cast

import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vae.config.data import DataConfig
from vae.data.decode import ImageError
from vae.data.sampler import EndlessSampler, Order, SampleIndex, seed_for
from vae.data.sources import Skipped, Source
from vae.data.transforms import Augmentation, center_crop, random_crop
from vae.distributed import outlive_signals, workers_for
from vae.errors import InputError, printable, require

ATTEMPTS = 100  # at finding a usable image for one place in a batch


class Sample(NamedTuple):
    """One image of a batch, and the images that were skipped on the way to it.

    `pixels` is None where an image of validation cannot be used.
    """

    pixels: Tensor | None  # None where the image cannot be used
    position: int
    name: str
    skipped: list[Skipped]
    is_enlarged: bool = False
    moments: Tensor | None = None
    hashed: str = ""


class Batch(NamedTuple):
    """A batch of images, with their positions and names.

    `images` are uint8 or uint16 (B, C, H, W), or what another cut makes of them. `positions` are sample positions in
    training, and indices in validation. They are plain integers, so that reading them never waits for a GPU. `skipped`
    are the images that could not be used. In training they are replaced. In validation they are missing, so that B may
    be 0, and `missing` has their indices. `enlarged` are the positions of images that had fewer pixels than are shown.
    `moments` (B, 2 * latent_channels, h, w) are the posteriors', where they are known beforehand. `hashes` are those of
    held-out images as they were decoded.
    """

    images: Tensor
    positions: list[int]
    names: list[str]
    skipped: list[Skipped]
    enlarged: Sequence[int] = ()
    missing: Sequence[int] = ()
    moments: Tensor | None = None
    hashes: Sequence[str] = ()

    def single(self, place: int) -> "Batch":
        """Return one of its images as a batch of its own."""
        one = slice(place, place + 1)
        moments = self.moments
        known = None if moments is None else moments[one]
        return Batch(self.images[one], self.positions[one], self.names[one], [], moments=known)


class TrainingImages(Dataset[Sample]):
    """The image of each SampleIndex, cropped and augmented as its position decides.

    Where an image cannot be used, another one takes its place. Raises InputError after 100 such images in a row.
    """

    def __init__(self, source: Source, order: Order, config: DataConfig, channels: int, seed: int) -> None:
        self.source = source
        self.order = order
        self.config = config
        self.channels = channels
        self.seed = seed
        low, high = config.crop_scale or ([1.0, 1.0] if config.bucket_resolutions else [0.5, 1.0])
        self.augmentation = Augmentation((low, high), config.flip, config.rotation, config.colour)
        self._unusable: set[int] = set()  # each worker lists such an image once, and does not try it again

    def __getitem__(self, pick: SampleIndex) -> Sample:
        skipped: list[Skipped] = []
        reason = "named before"

        for attempt in range(ATTEMPTS):
            try:
                if pick.number not in self._unusable:
                    return self._sample(pick)._replace(skipped=skipped)
            except ImageError as error:
                reason = str(error)
                self._unusable.add(pick.number)
                name = self.source.names[pick.number]
                skipped.append(Skipped(name, reason, not isinstance(error, TooSmallError)))

            pick = self.order.replacement(pick, attempt)

        raise InputError(f"{ATTEMPTS} images in a row cannot be used, the last: {reason}")

    def _sample(self, pick: SampleIndex) -> Sample:
        """Open one image and crop it at random."""
        pixels = random_crop(self._open(pick), pick.size, self.augmentation, self._draw(pick))
        return Sample(pixels, pick.position, self.source.names[pick.number], [])

    def _open(self, pick: SampleIndex) -> Tensor:
        """Decode an image. Raise TooSmallError where it is smaller than its crop, or than data.min_side."""
        pixels = self.source.open(pick.number, self.channels, self.config.bits)
        smallest = (side, side) if (side := self.config.min_side) else pick.size
        _check_sides(pixels, smallest, self.source.label(pick.number), "lower data.resolution, or set data.min_side")
        return pixels

    def _draw(self, pick: SampleIndex) -> torch.Generator:
        """Return the generator of a position's random choices."""
        return torch.Generator().manual_seed(seed_for(self.seed, pick.position))


Cut = Callable[[Tensor, int], Tensor]  # (pixels (C, H, W), side) -> (C, side, side)


class HeldOutImages(Dataset[Sample]):
    """Each image's central square, by index, as `cut` makes it."""

    def __init__(self, source: Source, config: DataConfig, channels: int, cut: Cut = center_crop) -> None:
        self.source = source
        self.config = config
        self.channels = channels
        self.cut = cut

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        name = self.source.names[index]

        try:
            pixels = self.source.open(index, self.channels, self.config.bits)
            smallest = self.config.min_side or 1
            _check_sides(pixels, (smallest, smallest), self.source.label(index), "lower data.min_side")
        except ImageError as error:
            return Sample(None, index, name, [Skipped(name, str(error), not isinstance(error, TooSmallError))])

        side = self.config.resolution
        is_enlarged = min(pixels.shape[1:]) < side
        hashed = hash_of_pixels(pixels)
        return Sample(self.cut(pixels, side), index, name, [], is_enlarged=is_enlarged, hashed=hashed)


class TooSmallError(ImageError):
    """An image is whole, but its shorter side is below the least that is accepted."""


def hash_of_pixels(pixels: Tensor) -> str:
    """Return XXH3, 128 bits, of a decoded image (C, H, W): of its shape, depth and values.

    It is the same on every machine. It is taken before the image is cut, because a cut may compute in floats, whose
    last bits are a machine's own. Channels come last, as decoders leave them in memory: in the other order, hashing a
    photograph takes half as long as decoding it.
    """
    digest = xxhash.xxh3_128(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(pixels.permute(1, 2, 0).contiguous().numpy().data)
    return digest.hexdigest()


def training_loader(images: TrainingImages, sampler: EndlessSampler) -> DataLoader[Batch]:
    """Load training batches without end, in the order of `sampler`."""
    return _loader(images, images.config, images.config.batch_size, sampler)


def validation_loader(
    source: Source, config: DataConfig, channels: int, rank: int, world_size: int
) -> DataLoader[Batch]:
    """Load this rank's share, in order and without padding: no image is ever counted twice."""
    return indexed_loader(HeldOutImages(source, config, channels), range(rank, len(source), world_size))


def indexed_loader(images: HeldOutImages, indices: Sequence[int]) -> DataLoader[Batch]:
    """Load batches of the images at `indices`, in that order."""
    return _loader(Subset(images, indices), images.config, images.config.validation_batch_size, sampler=None)


def first_images(source: Source, config: DataConfig, channels: int) -> Tensor:
    """Load the first images that can be read, as many as a validation batch has: (B, C, H, W).

    Raises InputError where there is none.
    """
    samples = map(HeldOutImages(source, config, channels).__getitem__, range(len(source)))
    readable = (sample.pixels for sample in samples if sample.pixels is not None)
    found = list(islice(readable, config.validation_batch_size))
    require(bool(found), "none of the validation images can be read", "some; replace them")
    return torch.stack(found)


def _check_sides(pixels: Tensor, smallest: tuple[int, int], label: str, remedy: str) -> None:
    """Raise TooSmallError where pixels (C, H, W) are smaller than `smallest` (height, width)."""
    height, width = pixels.shape[1:]
    if height < smallest[0] or width < smallest[1]:
        expected = f"{smallest[1]}x{smallest[0]} or more"
        raise TooSmallError(f"{printable(label)}: {width}x{height} pixels, expected {expected}; {remedy}")


def _collate(samples: Sequence[Sample]) -> Batch:
    """Make a batch of samples. Those without pixels are listed as missing."""
    usable = [(sample.pixels, sample) for sample in samples if sample.pixels is not None]
    images = torch.stack([pixels for pixels, _ in usable]) if usable else torch.empty(0, dtype=torch.uint8)

    skipped = [one for sample in samples for one in sample.skipped]
    enlarged = [one.position for _, one in usable if one.is_enlarged]
    missing = [sample.position for sample in samples if sample.pixels is None]
    positions, names = [one.position for _, one in usable], [one.name for _, one in usable]

    known = [one.moments for _, one in usable if one.moments is not None]
    moments = torch.stack(known) if known else None
    hashes = [one.hashed for _, one in usable]
    return Batch(images, positions, names, skipped, enlarged, missing, moments, hashes)


def shut_down(loader: DataLoader[Batch]) -> None:
    """End the loader's workers now. After an error the interpreter's exit would wait for them."""
    iterator = getattr(loader, "_iterator", None)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def _loader(
    dataset: Dataset[Sample], config: DataConfig, batch_size: int, sampler: EndlessSampler | None
) -> DataLoader[Batch]:
    """Make a DataLoader whose workers leave signals to the main process."""
    workers = workers_for(config.workers)

    return DataLoader(
        cast(Dataset[Batch], dataset),  # the loader gives what _collate makes of samples
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise every iteration draws from the global generator
        worker_init_fn=outlive_signals,
    )
