"""Cached latents: `vae cache-latents` encodes images once into shards, and `LatentShards` reads these to train on.

A shard is a safetensors file. It holds the latents of its images, either the posteriors' moments or one sample each,
and in its metadata their names and all that is needed to use them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vae.data.sampler import seed_for
from vae.data.transforms import to_model_range
from vae.datasets.jobs import Job, Json, Made, Read, Squares, collate, make
from vae.distributed import Advance
from vae.errors import InputError, require
from vae.latents import scale_latents, scale_moments, unscale_latents
from vae.models.base import Autoencoder
from vae.models.posterior import DiagonalGaussian
from vae.weights.latent_files import DRAWN, FLIPPED, MOMENTS, NAMES, SCALE_KEYS, StoredLatents, encoder_digest, scale_of
from vae.weights.loaded import of_family
from vae.weights.safetensors_io import MAX_HEADER, Piece, write_pieces


class LatentShards(StoredLatents, Dataset[Tensor]):
    """The latents that `vae cache-latents` wrote, as a data set to train a diffusion model on.

    `dataset[number]` is (C, h, w) in float32, scaled as a diffusion model is trained on it, or raw with `scaled=False`.
    Where posteriors are stored, each access draws a new sample from torch's global generator. Where mirrored images are
    stored too, half of the accesses return one of these. `family`, for example "sd", states the scaling factor where
    the file of the autoencoder did not.

    Raises InputError where the scale is needed and neither the shards nor `family` tell it.
    """

    def __init__(self, folder: str | Path, *, scaled: bool = True, family: str | None = None) -> None:
        super().__init__(folder)
        self.scaled = scaled
        if family is not None:
            raw = not self.are_scaled
            require(raw, f"family={family!r} of scaled latents", "none: they were scaled when they were made")
            self.config = of_family(self.config, family)

        told = scaled == self.are_scaled or self.config.scale_is_known
        require(told, f"{self.folder}: raw latents that do not tell their scale", "family= with them, or scaled=False")

    def __getitem__(self, number: int) -> Tensor:
        mirrors = any(FLIPPED in name for name in self.stored)
        suffix = FLIPPED if mirrors and torch.rand(()).item() < 0.5 else ""
        if f"{MOMENTS[0]}{suffix}" in self.stored:
            mean, logvar = (self.row(number, f"{name}{suffix}")[None] for name in MOMENTS)
            latents = DiagonalGaussian(mean, logvar).sample()
        else:
            latents = self.row(number, f"{DRAWN[0]}{suffix}")[None].float()

        if self.scaled != self.are_scaled:
            latents = (scale_latents if self.scaled else unscale_latents)(latents, self.config)
        return latents[0]


SUFFIX = ".safetensors"
ABOUT = "vae.latents"  # the key in a shard's metadata under which its options are
ENLARGED = "enlarged"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoding:
    """How images are encoded: what is stored of each image's central square.

    That is its posterior, or, with a seed in `sample`, one sample of it. `resolution` is the square's side in pixels.
    `scaled` stores latents as diffusion models see them, `flip` those of mirrored images too.
    """

    resolution: int = 256
    sample: int | None = None
    scaled: bool = False
    flip: bool = False
    dtype: str = "float16"
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"--dtype {self.dtype}", f"one of {list(DTYPES)}")
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}", "1 or more")
        require(self.sample is None or self.sample >= 0, f"--sample {self.sample}", "a seed of 0 or more")

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the tensors in a shard."""
        names = MOMENTS if self.sample is None else DRAWN
        return (*names, *(f"{name}{FLIPPED}" for name in names)) if self.flip else names

    def described(self, model: Autoencoder) -> Json:
        """Return the options of a job that encodes with `model`, which is part of each shard's metadata.

        The scale of the latents is at the top level, if it is known, under the names that .latent files have for it.
        Raises InputError for options that the model cannot have.
        """
        factor = model.config.downsample_factor
        config = asdict(model.config)
        told = not self.scaled or model.config.scale_is_known
        require(told, "--scaled of a file that does not tell its scaling factor", "--family with it, or raw latents")
        require(self.resolution % factor == 0, f"--resolution {self.resolution}", f"a multiple of {factor}")

        network = {key: value for key, value in config.items() if key not in SCALE_KEYS}
        about = {"made": "latents", "stored": list(self.stored)} | asdict(self)
        return about | scale_of(model.config) | {"encoder": encoder_digest(model.state_dict()), "config": network}


@torch.no_grad()
def encode_shards(
    job: Job, encoding: Encoding, model: Autoencoder, shards: Sequence[int], *, workers: int, advance: Advance
) -> None:
    """Make the given shards of a job whose options are `encoding.described(model)`.

    `workers` is the number of processes that decode images. `advance` is called with the images that are done. Raises
    InputError for latents that the dtype on disk cannot hold.
    """
    squares = Squares(job.source, encoding.resolution, model.config.in_channels)
    batches = {shard: _batches(job.numbers(shard), encoding.batch_size) for shard in shards}
    order = cast(list[list[int]], [batch for shard in shards for batch in batches[shard]])  # ranges will do for lists
    read = iter(DataLoader(squares, batch_sampler=order, num_workers=workers, collate_fn=collate))

    for shard in shards:
        done: list[Read] = []
        tensors: dict[str, list[Tensor]] = {name: [] for name in encoding.stored}
        for _ in batches[shard]:
            batch = next(read)
            if isinstance(batch, InputError):
                raise batch
            if batch.names:
                for name, tensor in _encoded(model, batch, encoding).items():
                    tensors[name].append(_stored(tensor, name, batch, encoding.dtype))
            done.append(batch)
            advance(len(batch.names) + len(batch.dropped))

        make(job, shard, partial(_write, job, shard, done, tensors))


def _batches(numbers: range, size: int) -> list[range]:
    """Divide the numbers of a shard's images into batches.

    No batch crosses the end of a shard, so that batches are the same wherever work begins.
    """
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _encoded(model: Autoencoder, batch: Read, encoding: Encoding) -> dict[str, Tensor]:
    """Encode a batch, and return {name: float32 (B, C, h, w)} on the model's device."""
    images = to_model_range(batch.images.to(next(model.parameters()).device))
    views = {"": images, FLIPPED: images.flip(3)} if encoding.flip else {"": images}

    found = {}
    for salt, (suffix, view) in enumerate(views.items()):
        posterior = model.encode(view)
        if encoding.sample is None:
            moments = posterior.mean, posterior.logvar
            moments = scale_moments(*moments, model.config) if encoding.scaled else moments
            found |= {f"{name}{suffix}": moment for name, moment in zip(MOMENTS, moments, strict=True)}
            continue

        # Noise depends on seed and number alone and is drawn on the CPU: it is the same on every machine.
        seeds = [seed_for(encoding.sample, number, salt) for number in batch.numbers]
        shape = posterior.mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        latents = posterior.reparameterize(noise.to(images.device))
        found[f"latents{suffix}"] = scale_latents(latents, model.config) if encoding.scaled else latents
    return found


def _stored(tensor: Tensor, what: str, batch: Read, dtype: str) -> Tensor:
    """Return a tensor on the CPU and in the dtype on disk.

    Raises InputError where it is not finite in that dtype, with the image's name.
    """
    stored = tensor.cpu().to(DTYPES[dtype])
    for row in (~stored.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
        overflows = bool(tensor[row].isfinite().all())
        wrong = f"{what} beyond {dtype}" if overflows else f"NaN or infinite {what} from the model"
        remedy = "--dtype bfloat16 has room" if overflows else "vae inspect says whether its weights are sound"
        raise InputError(f"{batch.names[row]}: {wrong}; {remedy}")
    return stored


def _write(job: Job, shard: int, done: list[Read], tensors: dict[str, list[Tensor]], file: Path) -> Made:
    """Write a shard's tensors to `file`, and return what became of its images."""
    names = [name for batch in done for name in batch.names]
    metadata = {ABOUT: json.dumps(job.options), NAMES: json.dumps(names)}
    fits = len(json.dumps(metadata)) < MAX_HEADER // 2
    require(fits, f"--shard-images {job.shard_images}", "fewer: the names of as many images do not fit into a header")

    pieces = {name: _joined(parts) for name, parts in tensors.items() if parts}
    write_pieces(file, pieces, metadata, job.file(shard))

    dropped = [one for batch in done for one in batch.dropped]
    return Made(len(names), dropped, {ENLARGED: sum(batch.enlarged for batch in done)})


def _joined(parts: list[Tensor]) -> Piece:
    """Join tensors along the first dimension into one piece of a file, without a second copy in memory."""
    pieces = [Piece.of(part) for part in parts]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    size = sum(piece.size for piece in pieces)
    return Piece(pieces[0].dtype, shape, size, lambda: chain.from_iterable(piece.chunks() for piece in pieces))
