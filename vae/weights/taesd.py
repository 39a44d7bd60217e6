"""AutoencoderTiny's published files: the pair of TAESD files, ComfyUI's single file, and the folder of diffusers.

Our names are diffusers'. The published layers have the same numbers except in the decoder, whose first layer bounds the
latents and has no weights.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vae.config.model import ARCHITECTURES, AutoencoderConfig
from vae.files import State, WeightsError
from vae.models.autoencoder_tiny import LATENT_MAGNITUDE
from vae.weights.families import FAMILIES
from vae.weights.formats import WRITTEN_FOR, Format
from vae.weights.loaded import LoadedWeights, WeightsFile

ANCHOR = "decoder.layers.0.weight"
OURS = ("encoder.layers.", "decoder.layers.")
COMBINED = ("taesd_encoder.", "taesd_decoder.")  # ComfyUI's prefixes of the published names
SHIFTS = (0, 1)  # published layer number minus ours, of encoder and decoder
SCALE = ("vae_scale", "vae_shift")  # ComfyUI's tensors, with which it scales raw latents
FAMILY_OF = {"taesd": "sd", "taesdxl": "sdxl", "taesd3": "sd3", "taef1": "flux"}  # by the base name of a published file
HALF_NAME = r"(?:0|[1-9]\d*)\.(?:(?:conv|pool)\.\d\.)?(?:weight|bias)"
PAIR_FILE = re.compile(r"(?P<base>.+)_(?P<half>encoder|decoder)(?P<suffix>\.[^.]+)")
HALVES = ("encoder", "decoder")
USUAL_BLOCKS = 3  # per level, except the first level, which has one
AS_TINY: dict[str, Any] = {
    **ARCHITECTURES["tiny"].fixed,
    "architecture": "tiny",
    "scaling_factor": 1.0,
    "force_upcast": False,
}
USUAL_WIDTHS = [64] * 4
SAME = ("in_channels", "out_channels", "latent_channels", "scaling_factor", "force_upcast")  # as in diffusers
THEIR_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
THEIR_BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")
CONSTANTS = {  # fields of diffusers' AutoencoderTiny that have only one value here
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": LATENT_MAGNITUDE,
    "latent_shift": 0.5,
}


def is_half(names: Iterable[str]) -> bool:
    """Return whether these are the numbered layers of an encoder or a decoder, with nothing that says which."""
    names = list(names)
    return bool(names) and all(re.fullmatch(HALF_NAME, name, re.ASCII) for name in names)


def file_of_half(path: Path, half: str) -> Path:
    """Return the file with the encoder or the decoder (`half`) of the pair that `path` belongs to.

    The file may be `path` itself, and it need not exist. Raises WeightsError unless `path` is named as one of a pair.
    """
    named = PAIR_FILE.fullmatch(path.name)
    if named is None:
        raise WeightsError(f"{path}: one half of a tiny autoencoder; name the two NAME_encoder and NAME_decoder")
    return path.with_name(f"{named['base']}_{half}{named['suffix']}")


def pair_in(folder: Path) -> Path | None:
    """Return the decoder file of the one published pair in `folder`, or None where there is none.

    Raises WeightsError where there are several.
    """
    decoders = sorted(path for path in folder.glob("*_decoder.*") if file_of_half(path, "encoder").is_file())
    if len(decoders) > 1:
        raise WeightsError(f"{folder}: {len(decoders)} tiny autoencoders, name the file of one, as {decoders[0].name}")
    return decoders[0] if decoders else None


def to_combined(state: State, family: str | None = None) -> State:
    """Rename our tensors to ComfyUI's names, and add the scale of `family` where it is given."""
    renamed = {_renumbered(name, OURS, COMBINED, 1): tensor for name, tensor in state.items()}
    if family is None:
        return renamed

    scaling, shift = FAMILIES[family]
    return renamed | dict(zip(SCALE, (torch.tensor(scaling), torch.tensor(shift or 0.0)), strict=True))


def to_pair(state: State, path: Path) -> dict[Path, State]:
    """Rename our tensors to the published names: {file: tensors} for both files of the pair that `path` belongs to."""
    named = to_combined(state)
    return {
        file_of_half(path, half): {name.removeprefix(mark): t for name, t in named.items() if name.startswith(mark)}
        for half, mark in zip(HALVES, COMBINED, strict=True)
    }


def from_pair(encoder: State, decoder: State) -> State:
    """Combine the two published halves into one set of tensors under ComfyUI's names."""
    pairs = zip(COMBINED, (encoder, decoder), strict=True)
    return {f"{mark}{name}": tensor for mark, half in pairs for name, tensor in half.items()}


def infer_tiny(path: Path, state: State) -> AutoencoderConfig:
    """Read the architecture from tensors under our names.

    `path` is for the error. Raises WeightsError where the tensors are not a whole tiny autoencoder.
    """
    encoder, decoder = OURS
    try:
        first, *lower, last = _convolutions(state, encoder)
        into, out = state[f"{encoder}{first}.weight"], state[f"{encoder}{last}.weight"]

        return AutoencoderConfig(
            in_channels=into.shape[1],
            out_channels=state[f"{decoder}{_convolutions(state, decoder)[-1]}.weight"].shape[0],
            latent_channels=out.shape[0],
            block_out_channels=[into.shape[0]] * (1 + len(lower)),
            layers_per_block=last - lower[-1] - 1 if lower else USUAL_BLOCKS,
            mid_block_pool=any(".pool." in name for name in state),
            **AS_TINY,
        )
    except (IndexError, ValueError) as error:
        raise WeightsError(
            f"{path}: {len(state)} tensors of a tiny autoencoder (first {sorted(state)[:3]}) that are not a whole one; "
            f"is it one half?"
        ) from error


def _family_of(source: WeightsFile) -> str | None:
    """Return the family whose latents a tiny autoencoder has, or None.

    ComfyUI's scale says it, or the notes of one of our runs, or the name of a published file.
    """
    scale = source.state.get(SCALE[0])
    if scale is not None and scale.numel() == 1:
        near = (name for name, (factor, _) in FAMILIES.items() if math.isclose(factor, float(scale), rel_tol=1e-3))
        return next(near, None)

    known = source.notes.training.get("family")
    if isinstance(known, str) and known in FAMILIES:
        return known

    named = PAIR_FILE.fullmatch(source.file.name)
    return None if named is None else FAMILY_OF.get(named["base"])


def _convolutions(state: State, half: str) -> list[int]:
    """Return the numbers of the layers of `half` that are convolutions, ascending; the other layers are blocks."""
    matches = (re.fullmatch(rf"{re.escape(half)}(\d{{1,6}})\.weight", name, re.ASCII) for name in state)
    return sorted(int(match[1]) for match in matches if match)


def _renumbered(name: str, old: tuple[str, str], new: tuple[str, str], step: int) -> str:
    """Replace the `old` prefix of `name` by the `new` one, and move its layer number by `step` times the shift.

    A name without one of the `old` prefixes is kept, so that the strict check that follows reports it.
    """
    for before, after, shift in zip(old, new, SHIFTS, strict=True):
        numbered = re.fullmatch(rf"{re.escape(before)}(0|[1-9]\d{{0,5}})\.(.+)", name, re.ASCII)
        if numbered:
            return f"{after}{int(numbered[1]) + step * shift}.{numbered[2]}"
    return name


class TAESDFormat(Format):
    """The published files of AutoencoderTiny."""

    words = "TAESD's names, as in ComfyUI"
    never_cast = SCALE

    def names(self, names: Iterable[str]) -> set[str]:
        """Return the names that belong to a tiny autoencoder under published names, or to one half of it."""
        names = set(names)
        return names if is_half(names) else {name for name in names if name.startswith(COMBINED) or name in SCALE}

    def find(self, source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool) -> LoadedWeights | None:
        """Find a tiny autoencoder under ComfyUI's or diffusers' names."""
        layout, state = "diffusers", source.state
        if any(name.startswith(COMBINED) for name in state):
            layout = "taesd"
            state = {_renumbered(name, COMBINED, OURS, -1): tensor for name, tensor in state.items()}

        # The tensors may have a prefix, which the one first layer of the decoder shows.
        prefixes = [name.removesuffix(ANCHOR) for name in state if name.endswith(ANCHOR)]
        if len(prefixes) != 1:
            return None
        named = {name.removeprefix(prefixes[0]): t for name, t in state.items() if name.startswith(prefixes[0])}
        ours = {name: tensor for name, tensor in named.items() if name not in SCALE}

        config = config or source.config
        stated = config is not None
        config = config or infer_tiny(source.file, ours)
        self.check_kind(source.file, config)
        self.refuse_ema(source.file, ema=ema)

        others = len(source.state) - len(ours) - sum(name in SCALE for name in source.state)
        family = _family_of(source)
        return LoadedWeights(source.file, ours, config, layout, "live", family, stated, others, source.notes)

    def to_files(self, state: State, config: AutoencoderConfig, path: Path, family: str | None) -> dict[Path, State]:
        """Return both files of a pair where `path` is named as one of them, else ComfyUI's single file."""
        return to_pair(state, path) if PAIR_FILE.fullmatch(path.name) else {path: to_combined(state, family)}

    def to_diffusers(self, config: AutoencoderConfig) -> dict[str, Any]:
        """Return the fields of diffusers' AutoencoderTiny. Raises WeightsError where that class lacks a setting."""
        for name in ("mid_block_pool", "latents_mean", "latents_std"):
            if getattr(config, name):
                lacks = f"diffusers' AutoencoderTiny has no {name}"
                raise WeightsError(f"{lacks}; write one file, NAME.safetensors, instead")

        return {
            "_class_name": self.kind.network,
            "_diffusers_version": WRITTEN_FOR,
            **CONSTANTS,
            **{name: getattr(config, name) for name in SAME},
            "shift_factor": config.shift_factor or 0.0,
            **_their_shape(config),
        }

    def from_diffusers(self, values: dict[str, Any], path: Path) -> AutoencoderConfig:
        """Return the configuration of an AutoencoderTiny of diffusers. Both halves must have one shape."""
        try:
            blocks = values.get(THEIR_BLOCKS[0], [1] + [USUAL_BLOCKS] * 3)
            shape = {
                "block_out_channels": values.get(THEIR_WIDTHS[0], USUAL_WIDTHS),
                "layers_per_block": blocks[-1] if len(blocks) > 1 else USUAL_BLOCKS,
                "shift_factor": values.get("shift_factor") or None,
            }
            config = AutoencoderConfig(**(AS_TINY | {name: values[name] for name in SAME if name in values} | shape))
        except (TypeError, ValueError, LookupError) as error:
            raise WeightsError(f"{path}: {error}") from error

        # Fields that have one value here, and both halves' shapes, must be what our network computes.
        for name, expected in (CONSTANTS | _their_shape(config)).items():
            given = values.get(name, expected)
            if given != expected:
                raise WeightsError(f"{path}: {name} is {given!r:.80}, which is not supported, expected {expected!r}")
        return config

    def clients(self, config: AutoencoderConfig) -> list[str]:
        """List the programs that load a network of this configuration. Only new ones know the pool of TAEF2."""
        theirs = "ComfyUI (newer ones, as taef2)" if config.mid_block_pool else "ComfyUI"
        ours = [] if self.oddities(config) else [theirs]
        return ours if config.mid_block_pool else ["diffusers", *ours]

    def oddities(self, config: AutoencoderConfig) -> list[str]:
        """List the settings that ComfyUI does not support: widths, layers, image channels."""
        found = {
            f"widths {config.block_out_channels}": config.block_out_channels != USUAL_WIDTHS,
            f"{config.layers_per_block} layers per block": config.layers_per_block != USUAL_BLOCKS,
            f"{config.in_channels} image channels": (config.in_channels, config.out_channels) != (3, 3),
        }
        return [oddity for oddity, is_there in found.items() if is_there]

    def about_clients(self, config: AutoencoderConfig) -> list[str]:
        """Warn where ComfyUI cannot load the network."""
        odd = self.oddities(config)
        clients = self.clients(config)
        able = f"only {' and '.join(clients)} can" if clients else "no other program can"
        return [f"{able} load it ({', '.join(odd)}); the others expect a published tiny network"] if odd else []

    def about_scale(self, config: AutoencoderConfig, family: str | None) -> list[str]:
        """Warn where latents are not scaled as programs expect."""
        if config.scaling_factor == 1.0:
            return []
        scaled = f"programs take a tiny autoencoder's latents as scaled: scaling_factor {config.scaling_factor:.5g}"
        return [f"{scaled} is for a diffusion model of your own"]


def _their_shape(config: AutoencoderConfig) -> dict[str, list[int]]:
    """Return the fields of diffusers' AutoencoderTiny that state widths and numbers of blocks."""
    widths = config.block_out_channels
    blocks = [1] + [config.layers_per_block] * (len(widths) - 1)
    encoder, decoder = THEIR_BLOCKS
    return {**{name: widths for name in THEIR_WIDTHS}, encoder: blocks, decoder: blocks[::-1]}


FORMAT = TAESDFormat("tiny")
