"""Training images with the latents that `vae cache-latents` made for them, so that training does not run the encoder.

`match_cached_latents` finds the latents of a run's images and refuses those that do not belong to them.
`ImagesWithLatents` is the data set that yields both.
"""

import shlex

import numpy as np
import torch
from torch import Tensor

from vae.config.data import DataConfig
from vae.config.model import encoder_differences
from vae.config.schema import TrainConfig
from vae.data.decode import ImageError
from vae.data.loader import Sample, TrainingImages
from vae.data.sampler import Order, SampleIndex
from vae.data.sources import Files, Names, Source
from vae.data.transforms import center_crop, to_model_range
from vae.errors import InputError, printable
from vae.latents import unscale_moments
from vae.models.base import Autoencoder
from vae.weights.latent_files import FLIPPED, MOMENTS, StoredLatents, encoder_digest
from vae.weights.loaded import LoadedWeights

TRIED, UNLIKE = 4, 0.25  # images encoded again; relative error, far above that of half precision or another device


class PairedLatents:
    """Posteriors by the number of their image in a source.

    `rows` maps the number of an image in the source to its number in `stored`; -1 means that there is none.
    """

    def __init__(self, stored: StoredLatents, rows: np.ndarray) -> None:
        self.stored = stored
        self.rows = rows

    def moments(self, number: int, mirrored: bool) -> Tensor | None:
        """Return raw mean and logvar of an image, (2 * latent_channels, h, w) in float32.

        The result is None if the image could not be encoded.
        """
        row = int(self.rows[number])
        suffix = FLIPPED if mirrored else ""
        if row < 0:
            return None

        mean, logvar = (self.stored.row(row, f"{name}{suffix}").float()[None] for name in MOMENTS)

        if self.stored.are_scaled:
            mean, logvar = unscale_moments(mean, logvar, self.stored.config)
        return torch.cat([mean, logvar], dim=1)[0]


class ImagesWithLatents(TrainingImages):
    """Pick -> the central square of its image, mirrored or not as its position decides, and the square's moments."""

    def __init__(  # noqa: PLR0917
        self, latents: PairedLatents, source: Source, order: Order, config: DataConfig, channels: int, seed: int
    ) -> None:
        super().__init__(source, order, config, channels, seed)
        self.latents = latents

    def _sample(self, pick: SampleIndex) -> Sample:
        """Return image and moments of one pick.

        Raises ImageError for an image that `vae cache-latents` could not read.
        """
        mirrored = self.config.flip and torch.rand((), generator=self._draw(pick)).item() < 0.5
        moments = self.latents.moments(pick.number, mirrored)
        if moments is None:
            raise ImageError(f"{printable(self.source.label(pick.number))}: vae cache-latents could not read it")

        square = center_crop(self._open(pick), self.config.resolution)
        square = square.flip(2) if mirrored else square
        return Sample(square, pick.position, self.source.names[pick.number], [], moments=moments)


def match_cached_latents(config: TrainConfig, images: Source, found: LoadedWeights | None) -> PairedLatents:
    """Return the latents of `config.data.latents`, matched with `images` by name.

    Raises InputError if they do not fit the run, if an image has none, or if they are not of the encoder of `found`.
    A resumed run was checked when it began, so it has no `found` to compare with.
    """
    assert config.data.latents is not None
    stored = StoredLatents(config.data.latents)
    wrong = _difference(config, stored, found)
    rows = np.empty(0)
    if wrong is None:
        rows = _rows(Names(images.names), stored)
        wrong = _missing(images, rows, stored)
        if wrong is None and found is not None:
            wrong = _encoder_mismatch(config, images, PairedLatents(stored, rows), found.build())

    if wrong is not None:
        raise InputError(f"data.latents={config.data.latents!r}: {wrong}; {_remedy(config, images)}")
    return PairedLatents(stored, rows)


def _difference(config: TrainConfig, stored: StoredLatents, found: LoadedWeights | None) -> str | None:
    """Return why these latents are not what the run trains on, or None if they are."""
    data = config.data
    if MOMENTS[0] not in stored.stored:
        return "one sample of each posterior, where training draws anew"
    if stored.resolution != data.resolution:
        return f"of {stored.resolution} px, expected data.resolution={data.resolution}"
    if data.flip and f"{MOMENTS[0]}{FLIPPED}" not in stored.stored:
        return "none of mirrored images; set data.flip=false"
    return None if found is None else _of_another_encoder(config, stored, found)


def _of_another_encoder(config: TrainConfig, stored: StoredLatents, found: LoadedWeights) -> str | None:
    """Return how the encoder that made these latents differs from that of `found`, or None if it does not."""
    if stored.encoder is None:
        return "made before caches told their encoder"
    if stored.encoder != encoder_digest(found.state):
        return f"not of the encoder of init={config.init!r}"

    unlike = encoder_differences(stored.config, found.config, "init's")  # differences that no tensor shows
    return f"of an encoder whose {', '.join(unlike)}" if unlike else None


def _missing(images: Source, rows: np.ndarray, stored: StoredLatents) -> str | None:
    """Return which images have no latents, apart from those that could not be encoded, or None if all have."""
    missing = [images.names[int(number)] for number in np.flatnonzero(rows < 0)]
    dropped = stored.dropped() if missing else set()
    absent = [name for name in missing if name not in dropped]
    if not absent:
        return None
    return f"none for {len(absent):,} of {len(images):,} training images, the first: {printable(absent[0])}"


@torch.no_grad()
def _encoder_mismatch(config: TrainConfig, images: Source, latents: PairedLatents, model: Autoencoder) -> str | None:
    """Encode a few images and return which of them has other latents than the stored ones, or None.

    An image may have changed and kept its name, which only its pixels show.
    """
    for number in np.flatnonzero(latents.rows >= 0)[:: max(1, len(latents.rows) // TRIED)][:TRIED].tolist():
        try:
            pixels = images.open(number, model.config.in_channels)
        except ImageError:  # it is skipped when training comes to it
            continue

        square = to_model_range(center_crop(pixels, config.data.resolution))[None]
        stored = latents.moments(number, mirrored=False)
        expected = model.encode(square).mean
        assert stored is not None
        if (stored[None, : expected.shape[1]] - expected).norm() > UNLIKE * expected.norm():
            return f"not of {printable(images.label(number))} as it is now"
    return None


def _remedy(config: TrainConfig, images: Source) -> str:
    """Return the advice to run `vae cache-latents` on this run's images, under the names that they have in training."""
    data = config.data
    folder = images.root if data.source == "folder" and isinstance(images, Files) else None
    where = folder or data.root or data.source
    words = ["vae", "cache-latents", config.init, where, "FOLDER", "--resolution", data.resolution]

    words += ["--source", data.source] if data.source != "folder" else []
    words += ["--split", data.split] if data.source == "huggingface" else []
    words += ["--column", data.column] if data.column else []
    words += ["--streaming"] if data.streaming else []
    words += ["--flip"] if data.flip else []
    return f"{shlex.join(map(str, words))} makes those that fit"


def _rows(names: Names, stored: StoredLatents) -> np.ndarray:
    """Return for each name its number in `stored`, or -1 if it is not there."""
    wanted, there = names.hashes(), stored.hashes()

    # Sorted hashes, so that millions of names are matched quickly.
    order = np.argsort(there, kind="stable")
    places = np.searchsorted(there, wanted, sorter=order)

    # A place past the end becomes -1, which selects the appended 0; whether or not that matches, the result is -1.
    candidates = np.append(order, -1)[places]
    return np.where(np.append(there, np.uint64(0))[candidates] == wanted, candidates, -1)
