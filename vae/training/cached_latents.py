"""Training images with their latents, made before by `vae cache-latents`: the encoder is not run."""

import shlex

import numpy as np
import torch
from torch import Tensor

from vae.config.data import DataConfig
from vae.config.model import encoder_differences
from vae.config.schema import TrainConfig
from vae.data.decode import ImageError, printable
from vae.data.loader import Sample, TrainingImages
from vae.data.sampler import Order, SampleIndex
from vae.data.sources import Files, Names, Source
from vae.data.transforms import center_crop, to_model_range
from vae.errors import InputError
from vae.latents import unscale_moments
from vae.models.base import Autoencoder
from vae.weights.latent_files import FLIPPED, MOMENTS, StoredLatents, encoder_digest
from vae.weights.loaded import LoadedWeights

TRIED, UNLIKE = 4, 0.25  # images encoded again; relative error, far above what half precision and other devices make


class PairedLatents:
    """Posteriors by the number of their image in a source; `rows` are their numbers in `stored`, -1 for none."""

    def __init__(self, stored: StoredLatents, rows: np.ndarray) -> None:
        self.stored, self.rows = stored, rows

    def moments(self, number: int, mirrored: bool) -> Tensor | None:
        """Raw mean and logvar (2 * latent_channels, h, w) in float32; None where the image could not be encoded."""
        row, suffix = int(self.rows[number]), FLIPPED if mirrored else ""
        if row < 0:
            return None
        mean, logvar = (self.stored.row(row, f"{name}{suffix}").float()[None] for name in MOMENTS)
        if self.stored.are_scaled:
            mean, logvar = unscale_moments(mean, logvar, self.stored.config)
        return torch.cat([mean, logvar], dim=1)[0]


class ImagesWithLatents(TrainingImages):
    """A pick -> its image's central square, mirrored or not as its position decides, and the moments of just that."""

    def __init__(  # noqa: PLR0917
        self, latents: PairedLatents, source: Source, order: Order, config: DataConfig, channels: int, seed: int
    ) -> None:
        super().__init__(source, order, config, channels, seed)
        self.latents = latents

    def _sample(self, pick: SampleIndex) -> Sample:
        mirrored = self.config.flip and torch.rand((), generator=self._draw(pick)).item() < 0.5
        moments = self.latents.moments(pick.number, mirrored)
        if moments is None:
            raise ImageError(f"{printable(self.source.label(pick.number))}: vae cache-latents could not read it")
        square = center_crop(self._open(pick), self.config.resolution)
        square = square.flip(2) if mirrored else square
        return Sample(square, pick.position, self.source.names[pick.number], [], moments=moments)


def match_cached_latents(config: TrainConfig, images: Source, found: LoadedWeights | None) -> PairedLatents:
    """The latents of `config.data.latents` for `images`, by their names; refused where they are not `found`'s.

    A run that goes on has begun with them: it has no `found` to ask.
    """
    assert config.data.latents is not None
    stored = StoredLatents(config.data.latents)
    wrong, rows = _difference(config, stored, found), np.empty(0)
    if wrong is None:
        rows = _rows(Names(images.names), stored)
        wrong = _missing(images, rows, stored)
        if wrong is None and found is not None:
            wrong = _encoder_mismatch(config, images, PairedLatents(stored, rows), found.build())
    if wrong is not None:
        raise InputError(f"data.latents={config.data.latents!r}: {wrong}; {_remedy(config, images)}")
    return PairedLatents(stored, rows)


def _difference(config: TrainConfig, stored: StoredLatents, found: LoadedWeights | None) -> str | None:
    """Why they are not what is trained on."""
    data = config.data
    if MOMENTS[0] not in stored.stored:
        return "one sample of each posterior, where training draws anew"
    if stored.resolution != data.resolution:
        return f"of {stored.resolution} px, expected data.resolution={data.resolution}"
    if data.flip and f"{MOMENTS[0]}{FLIPPED}" not in stored.stored:
        return "none of mirrored images; set data.flip=false"
    return None if found is None else _of_another_encoder(config, stored, found)


def _of_another_encoder(config: TrainConfig, stored: StoredLatents, found: LoadedWeights) -> str | None:
    if stored.encoder is None:
        return "made before caches told their encoder"
    if stored.encoder != encoder_digest(found.state):
        return f"not of the encoder of init={config.init!r}"
    unlike = encoder_differences(stored.config, found.config, "init's")  # which no tensor tells
    return f"of an encoder whose {', '.join(unlike)}" if unlike else None


def _missing(images: Source, rows: np.ndarray, stored: StoredLatents) -> str | None:
    """Which images have none, those apart that could not be encoded."""
    missing = [images.names[int(number)] for number in np.flatnonzero(rows < 0)]
    dropped = stored.dropped() if missing else set()
    absent = [name for name in missing if name not in dropped]
    if not absent:
        return None
    return f"none for {len(absent):,} of {len(images):,} training images, the first: {printable(absent[0])}"


@torch.no_grad()
def _encoder_mismatch(config: TrainConfig, images: Source, latents: PairedLatents, model: Autoencoder) -> str | None:
    """Names may be of other pictures than they were: a few are encoded to see."""
    for number in np.flatnonzero(latents.rows >= 0)[:: max(1, len(latents.rows) // TRIED)][:TRIED].tolist():
        try:
            pixels = images.open(number, model.config.in_channels)
        except ImageError:  # left out when it is its turn
            continue
        square = to_model_range(center_crop(pixels, config.data.resolution))[None]
        stored, expected = latents.moments(number, mirrored=False), model.encode(square).mean
        assert stored is not None
        if (stored[None, : expected.shape[1]] - expected).norm() > UNLIKE * expected.norm():
            return f"not of {printable(images.label(number))} as it is now"
    return None


def _remedy(config: TrainConfig, images: Source) -> str:
    """The command whose images have the names that they have in training."""
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
    """Of each name its number in `stored`, -1 where it is not there."""
    wanted, there = names.hashes(), stored.hashes()
    order = np.argsort(there, kind="stable")
    places = np.searchsorted(there, wanted, sorter=order)
    candidates = np.append(order, -1)[places]
    return np.where(np.append(there, np.uint64(0))[candidates] == wanted, candidates, -1)
