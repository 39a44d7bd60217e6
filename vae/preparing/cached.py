"""The latents that `vae cache-latents` wrote, as a data set to train a diffusion model on."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vae.checkpoints.latentfile import SCALE_KEYS
from vae.checkpoints.tensorfile import Index, read_index
from vae.data.names import Computed
from vae.data.shards import INDEX
from vae.errors import InputError
from vae.latents import scale_latents, unscale_latents
from vae.models.autoencoder import AutoencoderConfig
from vae.models.posterior import DiagonalGaussian
from vae.preparing.latents import FLIPPED, MOMENTS, NAMES

INDICES, LISTS = 4096, 16  # of tensors and of names, kept of the shards last asked for


class LatentShards(Dataset[Tensor]):
    """number -> latents (C, h, w) as float32, as a diffusion model is trained on, or raw ones with `scaled=False`.

    Where posteriors are stored each access draws anew, from torch's global generator; where mirrored images are, half
    of the accesses give one. `config` is the autoencoder's, `names` are the images'. An access reads its latents alone,
    so that there may be any number of shards.
    """

    def __init__(self, folder: str | Path, *, scaled: bool = True) -> None:
        self.folder, self.scaled = Path(folder).expanduser(), scaled
        index = _read(self.folder)
        try:
            about = index["recipe"]
            self.config = AutoencoderConfig(**about["config"], **{key: about[key] for key in SCALE_KEYS})
            self.stored, self._are_scaled = tuple(about["stored"]), bool(about["scaled"])
            kept = [shard for shard in index["shards"] if shard["images"]]
            self.shards, self.counts = [shard["name"] for shard in kept], [int(shard["images"]) for shard in kept]
            sizes = [int(shard["bytes"]) for shard in kept]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / INDEX}: not an index of vae cache-latents ({error!r})") from error
        self._check_there(sizes)
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self.names = Computed(len(self), self.name)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.counts else 0

    def __getitem__(self, number: int) -> Tensor:
        shard, row = self.place(number)
        index = self._index(shard)
        suffix = FLIPPED if any(FLIPPED in name for name in self.stored) and torch.rand(()).item() < 0.5 else ""
        if f"{MOMENTS[0]}{suffix}" in self.stored:
            mean, logvar = (index.row(f"{name}{suffix}", row)[None] for name in MOMENTS)
            latents = DiagonalGaussian(mean, logvar).sample()
        else:
            latents = index.row(f"latents{suffix}", row)[None].float()
        if self.scaled != self._are_scaled:
            latents = (scale_latents if self.scaled else unscale_latents)(latents, self.config)
        return latents[0]

    def name(self, number: int) -> str:
        shard, row = self.place(number)
        return _names_in(self.folder / self.shards[shard])[row]

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, row in it)"""
        number = range(len(self))[number]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self.counts[shard]

    def _index(self, shard: int) -> Index:
        index = _index_of(self.folder / self.shards[shard])
        for name in self.stored:
            shape = index.entries[name].shape if name in index.entries else ()
            if len(shape) != 4 or shape[:2] != (self.counts[shard], self.config.latent_channels):
                raise _damaged(index.path, f"{name} is {shape}")
        return index

    def _check_there(self, sizes: list[int]) -> None:
        for name, size in zip(self.shards, sizes, strict=True):
            file = self.folder / name
            if not file.is_file():
                raise InputError(f"{file}: no such file; restore it, or make it again by vae cache-latents")
            if file.stat().st_size != size:
                raise _damaged(file, f"{file.stat().st_size:,} bytes, expected {size:,}")


@lru_cache(maxsize=INDICES)
def _index_of(file: Path) -> Index:
    return replace(read_index(file), metadata={})  # the names are much longer than all the rest


@lru_cache(maxsize=LISTS)
def _names_in(file: Path) -> list[str]:
    metadata = read_index(file).metadata
    try:
        return json.loads(metadata[NAMES])
    except (KeyError, ValueError) as error:
        raise _damaged(file, "no names of images in it") from error


def _read(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: not there; vae cache-latents writes it when all shards are made") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as an index ({error}); vae cache-latents makes it again") from error
    if not isinstance(index, dict) or not isinstance(index.get("recipe"), dict):
        raise InputError(f"{file}: not an index of vae cache-latents")
    if index["recipe"].get("made") != "latents":
        raise InputError(f"{folder}: holds images, not latents; vae cache-latents makes latents of them")
    return index


def _damaged(file: Path, wrong: str) -> InputError:
    return InputError(f"{file}: damaged or of another job ({wrong}); remove it and run vae cache-latents again")
