"""Put an autoencoder into a full diffusion checkpoint. Every other tensor is copied byte for byte, as a stream."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vae.files import WeightsError
from vae.weights.families import LATENT_CHANNELS, family_beside, family_of
from vae.weights.formats import ANCHOR
from vae.weights.ldm import PREFIXES, prefix_of, to_ldm
from vae.weights.load import is_pickle
from vae.weights.loaded import LoadedWeights
from vae.weights.pickle_io import read_pickle
from vae.weights.safetensors_io import DTYPES, Narrowed, Piece, narrowed, pieces_of, read_index, write_safetensors

PREFIX_OF = dict.fromkeys(("sd", "sdxl", "x4", "sd3"), "first_stage_model.") | {"flux": "vae."}
USUAL = ("F32", "F16", "BF16")  # types that autoencoders are stored in; in an 8-bit checkpoint it keeps its own type
STALE_KEYS = ("vae.", "modelspec.hash_sha256", "sshs_")  # of metadata that is untrue of the new file
SD_OUTPUT = "model.diffusion_model.out.2.weight"  # (latent channels, ...)


@dataclass(frozen=True)
class Baked:
    """What `bake` did, in numbers of tensors, for the user to read."""

    family: str | None
    prefix: str
    dtype: torch.dtype | None  # what the autoencoder was cast to; None where it was not
    written: int
    replaced: int
    kept: int
    lost: Narrowed | None  # in that cast


def bake(found: LoadedWeights, checkpoint: Path, target: Path, advance: Callable[[int], object] = int) -> Baked:
    """Write `checkpoint` to `target` with the autoencoder `found` in place of its own.

    All tensors of the old autoencoder are removed first. The new ones are cast to the checkpoint's precision. `advance`
    is called with the number of bytes of each write. Raises WeightsError where the autoencoder does not fit the
    checkpoint, where `checkpoint` is not a full one, or where `target` is not a safetensors file.
    """
    if found.config.architecture != "kl":
        kind = f"a {found.config.architecture} autoencoder"
        raise WeightsError(f"{found.file}: {kind}, which no checkpoint has a place for; bake a KL one")
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: name it NAME.safetensors; what is written is never a pickle")

    pieces, metadata = _read(checkpoint)
    prefix = _prefix(checkpoint, pieces)
    stale = {name: piece for name, piece in pieces.items() if name.startswith((prefix, *_prefixes(pieces)))}
    kept = {name: piece for name, piece in pieces.items() if name not in stale}

    _check_channels(found, checkpoint, pieces, prefix)
    _check_network(found, checkpoint, {name.removeprefix(prefix): piece.shape for name, piece in stale.items()})

    dtype = _precision(stale or kept)
    state = to_ldm(found.state, found.config)
    weights = pieces_of(target, state, dtype)
    ours = {prefix + name: piece for name, piece in weights.items()}
    write_safetensors(target, kept | ours, metadata, advance)

    family = family_beside(pieces, found.config) or family_of(pieces)
    lost = None if dtype is None else narrowed(state, dtype)
    return Baked(family, prefix, dtype, len(ours), len(stale), len(kept), lost)


def size_after(found: LoadedWeights, checkpoint: Path) -> int:
    """Estimate how many bytes `bake` will write, for a progress bar. Raises WeightsError where there is no file."""
    is_pickle(checkpoint)  # raises where it is not a file
    return checkpoint.stat().st_size + sum(tensor.numel() for tensor in found.state.values())


def _read(checkpoint: Path) -> tuple[dict[str, Piece], dict[str, str]]:
    """Read a checkpoint: (pieces of all its tensors, metadata that stays true). A pickle has no metadata."""
    if is_pickle(checkpoint):
        return {name: Piece.of(tensor) for name, tensor in read_pickle(checkpoint, whole=True).items()}, {}
    index = read_index(checkpoint)
    metadata = {key: value for key, value in index.metadata.items() if not key.startswith(STALE_KEYS)}
    return {name: Piece.copied(index, name) for name in index.entries}, metadata


def _prefix(checkpoint: Path, names: Iterable[str]) -> str:
    """Return the prefix under which the programs of this checkpoint look for its autoencoder.

    Raises WeightsError where the checkpoint is an autoencoder alone, or where the place cannot be told.
    """
    names = list(names)
    prefix, family = prefix_of(names), family_of(names)
    if family in PREFIX_OF and PREFIX_OF[family] in _prefixes(names):
        return PREFIX_OF[family]

    if prefix == "":
        raise WeightsError(f"{checkpoint}: an autoencoder by itself, not a full checkpoint; use vae convert")
    if prefix is None and family is None:
        raise WeightsError(
            f"{checkpoint}: neither an autoencoder in it nor a diffusion model of {', '.join(PREFIX_OF)}; "
            f"where the autoencoder belongs cannot be told"
        )
    return prefix if prefix is not None else PREFIX_OF[family or ""]


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of every autoencoder in the checkpoint; there may be several under different names."""
    return [prefix for prefix in PREFIXES if prefix and prefix + ANCHOR in names]


def _check_network(found: LoadedWeights, checkpoint: Path, old: dict[str, tuple[int, ...]]) -> None:
    """Raise WeightsError where the checkpoint's autoencoder is another network than `found`.

    The one that is there shows which network the checkpoint's programs build. `old` are the shapes of its tensors,
    without prefix.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in to_ldm(found.state, found.config).items()}
    differing = [name for name, shape in ours.items() if old and math.prod(old.get(name, ())) != math.prod(shape)]

    # Only an old autoencoder in LDM's names can be compared name by name.
    if differing and ANCHOR in old and any(".mid.block_1." in name for name in old):
        raise WeightsError(
            f"{found.file}: another network than the autoencoder in {checkpoint}, {len(differing)} tensors differ "
            f"(first {differing[:3]}); bake one of its architecture"
        )


def _check_channels(found: LoadedWeights, checkpoint: Path, pieces: dict[str, Piece], prefix: str) -> None:
    """Raise WeightsError where the checkpoint's diffusion model works on another number of latent channels."""
    family = family_of(pieces)
    channels = LATENT_CHANNELS.get(family or "")
    if prefix + ANCHOR in pieces:
        channels = pieces[prefix + ANCHOR].shape[1]
    elif SD_OUTPUT in pieces:
        channels = pieces[SD_OUTPUT].shape[0]

    ours = found.config.latent_channels
    if channels not in (None, ours):
        raise WeightsError(
            f"{found.file}: {ours} latent channels, but the diffusion model of {checkpoint} works on {channels}; "
            f"bake an autoencoder of its family"
        )


def _precision(pieces: dict[str, Piece]) -> torch.dtype | None:
    """Return the dtype of most bytes of `pieces`, or None where an autoencoder cannot be stored in it."""
    sizes: Counter[str] = Counter()
    for piece in pieces.values():
        sizes[piece.dtype] += piece.size
    (most, _), *_ = sizes.most_common(1)
    return DTYPES[most] if most in USUAL else None
