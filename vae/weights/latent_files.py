"""Latents on disk: one image per file, and shards of many.

A single file has the form of ComfyUI's .latent files, so it opens there too. Shards are written by `vae cache-latents`
and read here one row at a time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.data.shards import DROPPED, INDEX
from vae.data.sources import Computed, Names
from vae.errors import InputError
from vae.files import WeightsError
from vae.weights.families import FAMILIES
from vae.weights.safetensors_io import Index, Piece, read_index, write_safetensors
from vae.weights.taesd import AS_TINY

SUFFIX = ".latent"
RAW = "latent_tensor"  # ComfyUI's key, for raw latents
MARK = "latent_format_version_0"  # without this empty tensor ComfyUI assumes latents scaled by SD's factor
SCALED = "scaled_latents"  # a key of ours, so that nobody takes scaled latents for raw ones
DESCRIBED = "vae.latents"  # our key in the metadata
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
TINY_SHAPE = {**AS_TINY, "block_out_channels": [64] * 4}  # any: only the scale of a tiny maker is used


def write_latents(path: Path, latents: Tensor, config: AutoencoderConfig, *, scaled: bool, drawn: str) -> None:
    """Write `latents` (1, C, h, w) to a .latent file.

    The metadata states whether they are `scaled`, by which scale, how they were `drawn` from the posterior, and the
    architecture. A scale that is not known is not written, and `scaled` latents must have a known one.
    """
    assert config.scale_is_known or not scaled
    tensors = {SCALED: latents} if scaled else {RAW: latents, MARK: torch.empty(0)}
    about = {"scaled": scaled, "drawn": drawn, "architecture": config.architecture}
    described = json.dumps(about | scale_of(config), sort_keys=True)
    write_safetensors(path, {name: Piece.of(tensor) for name, tensor in tensors.items()}, {DESCRIBED: described})


def scale_of(config: AutoencoderConfig) -> dict[str, Any]:
    """Return what a file of latents states about their scale; nothing where the scale is not known."""
    return {key: value for key, value in asdict(config).items() if key in SCALE_KEYS} if config.scale_is_known else {}


def stated_scale(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scale that `scale_of` put into a file. Raises KeyError where a part of it is missing."""
    return {key: about[key] for key in SCALE_KEYS} if SCALE_KEYS[0] in about else {}


def scale_in(path: Path, channels: int) -> AutoencoderConfig | None:
    """Return a configuration with the architecture and the scale of the autoencoder that made the latents in a file.

    Return None where the file does not state them. Raises WeightsError where what it states is impossible.
    """
    described = read_index(path).metadata.get(DESCRIBED)
    if described is None:
        return None

    try:
        about = json.loads(described)
        if about["scaled"] in (True, False) and SCALE_KEYS[0] not in about:
            return None
        scale = stated_scale(about)
        unscaled = {**dict.fromkeys(SCALE_KEYS), SCALE_KEYS[0]: 1.0}
        usual = "tiny" if scale == unscaled else "kl"  # early files do not state the architecture
        shape = TINY_SHAPE if about.get("architecture", usual) == "tiny" else {}
        return AutoencoderConfig(**{**shape, "latent_channels": channels, **scale})
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise WeightsError(f"{path}: its {DESCRIBED} is not readable ({error}); encode the image again") from error


def read_latents(path: Path, channels: int) -> tuple[Tensor, bool]:
    """Read a .latent file of ours or of ComfyUI: (float32 latents (B, channels, h, w), whether they are scaled).

    Raises WeightsError where there are none, of another shape, or with NaN or infinite values.
    """
    index = read_index(path)
    key = next((key for key in (RAW, SCALED) if key in index.entries), None)
    if key is None:
        raise WeightsError(
            f"{path}: neither {RAW} nor {SCALED} in it; expected a {SUFFIX} file of vae encode or ComfyUI's"
        )

    latents = index.read(key).float()
    if latents.ndim != 4 or latents.shape[1] != channels:
        shape = tuple(latents.shape)
        raise WeightsError(f"{path}: latents are {shape}, expected (images, {channels}, height, width) for this model")
    if not latents.isfinite().all():
        raise WeightsError(f"{path}: latents hold NaN or infinite values; encode the image again")

    # As in ComfyUI: latents without the mark are taken for scaled by SD's factor.
    if key == RAW and MARK not in index.entries:
        latents = latents / FAMILIES["sd"][0]
    return latents, key == SCALED


NAMES = "vae.names"  # key of a shard's metadata
MOMENTS = ("mean", "logvar")
DRAWN = ("latents",)
FLIPPED = "_flipped"  # names of its tensors
INDICES, LISTS = 4096, 16  # indices and lists of names that are kept, of the shards used last
ENCODING = ("encoder.", "quant_conv.")  # the weights that posteriors depend on


def encoder_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and float32 values of those weights that posteriors depend on.

    Autoencoders that differ only in the decoder have the same digest, because their latents are the same.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(ENCODING)):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def config_digest(config: AutoencoderConfig) -> str:
    """Return the SHA-256 of what else scaled latents depend on: settings that no tensor's name or shape shows."""
    told = {name: getattr(config, name) for name in ("norm_num_groups", *SCALE_KEYS)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class StoredLatents:
    """What is stored of each image in a folder of shards, by the image's number.

    `config` is the autoencoder's configuration, `names` are the images' names, `stored` are the names of the tensors
    that each image has, `are_scaled` says whether they are scaled for a diffusion model, and `encoder` is the digest of
    the encoder that made them. An access reads one row only, so there may be any number of shards.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the index of `folder` and check that every shard is there.

        Raises InputError where the index is not readable or a shard is missing or has another size.
        """
        self.folder = Path(folder).expanduser()
        index = _read(self.folder)
        try:
            about = index["recipe"]
            scale = stated_scale(about)
            config = AutoencoderConfig(**about["config"], **scale)
            self.config = config if scale else config.assuming_its_scale()
            self.stored, self.are_scaled = tuple(about["stored"]), bool(about["scaled"])
            self.resolution = int(about["resolution"])
            self.encoder = about.get("encoder")  # early indices lack it
            kept = [shard for shard in index["shards"] if shard["images"]]
            self.shards = [shard["name"] for shard in kept]
            self.counts = [int(shard["images"]) for shard in kept]
            sizes = [int(shard["bytes"]) for shard in kept]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / INDEX}: not an index of vae cache-latents ({error!r})") from error

        self._check_there(sizes)
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self.names = Computed(len(self), self.name)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.counts else 0

    def row(self, number: int, name: str) -> Tensor:
        """Read a stored tensor (C, h, w) of one image, in the type on disk."""
        shard, row = self.place(number)
        return self._index(shard).row(name, row)

    def name(self, number: int) -> str:
        """Return the name of one image."""
        shard, row = self.place(number)
        return _names_in(self.folder / self.shards[shard])[row]

    def place(self, number: int) -> tuple[int, int]:
        """Return (index of the shard, row in it) of one image. Raises IndexError beyond the last one."""
        number = range(len(self))[number]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self.counts[shard]

    def hashes(self) -> np.ndarray:
        """Return the hashes of all names, as `Names.hashes` computes them."""
        found = [Names(_names_in(self.folder / shard)).hashes() for shard in self.shards]
        return np.concatenate([np.empty(0, np.uint64), *found])

    def dropped(self) -> set[str]:
        """Return the names of the images that could not be encoded. Raises InputError where they are not readable."""
        file = self.folder / DROPPED
        try:
            return {json.loads(line)["name"] for line in file.read_text(encoding="utf-8").splitlines()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: not readable ({error}); vae cache-latents makes it again") from error

    def fingerprint(self) -> str:
        """Return a digest of the index, which changes when any latents do."""
        return hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()

    def _index(self, shard: int) -> Index:
        """Return the index of a shard. Raises InputError where its tensors are not those of the folder's index."""
        index = _index_of(self.folder / self.shards[shard])
        for name in self.stored:
            shape = index.entries[name].shape if name in index.entries else ()
            if len(shape) != 4 or shape[:2] != (self.counts[shard], self.config.latent_channels):
                raise _damaged(index.path, f"{name} is {shape}")
        return index

    def _check_there(self, sizes: list[int]) -> None:
        """Raise InputError unless every shard exists and has the size that the index states."""
        for name, size in zip(self.shards, sizes, strict=True):
            file = self.folder / name
            if not file.is_file():
                raise InputError(f"{file}: no such file; restore it, or make it again by vae cache-latents")
            if file.stat().st_size != size:
                raise _damaged(file, f"{file.stat().st_size:,} bytes, expected {size:,}")


@lru_cache(maxsize=INDICES)
def _index_of(file: Path) -> Index:
    """Return the index of a shard, without its metadata; the most recent ones are kept."""
    return replace(read_index(file), metadata={})  # the names are much longer than all the rest


@lru_cache(maxsize=LISTS)
def _names_in(file: Path) -> list[str]:
    """Return the names of the images in a shard, by row; the most recent lists are kept."""
    metadata = read_index(file).metadata
    try:
        return json.loads(metadata[NAMES])
    except (KeyError, ValueError) as error:
        raise _damaged(file, "no names of images in it") from error


def _read(folder: Path) -> dict[str, Any]:
    """Read the index of a folder of latents. Raises InputError where it is not one."""
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
    """Return the error for a shard that is not the one its index describes."""
    return InputError(f"{file}: damaged or of another job ({wrong}); remove it and run vae cache-latents again")
