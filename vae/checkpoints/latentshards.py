"""Shards of latents, as `vae cache-latents` writes them: what is stored of each image, read a row at a time."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vae.checkpoints.latentfile import SCALE_KEYS, stated_scale
from vae.checkpoints.tensorfile import Index, read_index
from vae.data.names import Computed, Names
from vae.data.shards import DROPPED, INDEX
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderConfig

NAMES = "vae.names"  # key of a shard's metadata
MOMENTS, DRAWN, FLIPPED = ("mean", "logvar"), ("latents",), "_flipped"  # names of its tensors
INDICES, LISTS = 4096, 16  # of tensors and of names, kept of the shards last asked for
ENCODING = ("encoder.", "quant_conv.")  # the weights that posteriors are a function of


def encoder_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and the float32 values of those weights of an autoencoder that its posteriors depend on.

    Whatever decoder it has, the latents are the same.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(ENCODING)):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def config_digest(config: AutoencoderConfig) -> str:
    """SHA-256 over what scaled latents depend on besides: what no tensor's name or shape tells."""
    told = {name: getattr(config, name) for name in ("norm_num_groups", *SCALE_KEYS)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class StoredLatents:
    """number -> what is stored of an image. `config` is the autoencoder's, `names` are the images'.

    `stored` are the names of the tensors, `are_scaled` says whether for a diffusion model, `encoder` is the digest of
    what made them. An access reads its row alone, so that there may be any number of shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        index = _read(self.folder)
        try:
            about = index["recipe"]
            scale = stated_scale(about)
            config = AutoencoderConfig(**about["config"], **scale)
            self.config = config if scale else config.assuming_its_scale()
            self.stored, self.are_scaled = tuple(about["stored"]), bool(about["scaled"])
            self.resolution, self.encoder = int(about["resolution"]), about.get("encoder")  # early ones do not tell
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

    def row(self, number: int, name: str) -> Tensor:
        """(C, h, w) of one of the tensors, in the type on disk."""
        shard, row = self.place(number)
        return self._index(shard).row(name, row)

    def name(self, number: int) -> str:
        shard, row = self.place(number)
        return _names_in(self.folder / self.shards[shard])[row]

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, row in it)"""
        number = range(len(self))[number]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self.counts[shard]

    def hashes(self) -> np.ndarray:
        """Of all names, as `Names` has them."""
        found = [Names(_names_in(self.folder / shard)).hashes() for shard in self.shards]
        return np.concatenate([np.empty(0, np.uint64), *found])

    def dropped(self) -> set[str]:
        """Names of the images that could not be encoded."""
        file = self.folder / DROPPED
        try:
            return {json.loads(line)["name"] for line in file.read_text(encoding="utf-8").splitlines()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not readable ({error}); vae cache-latents makes it again") from error

    def fingerprint(self) -> str:
        """Another one when any latents are others."""
        return hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()

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
