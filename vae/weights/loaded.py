"""An autoencoder as it was read from a path, and what its weights file says about itself.

Our files state their configuration and notes in the metadata of the safetensors header. The web UIs read none of it;
people, `vae inspect` and this library do.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.files import State, WeightsError
from vae.models.base import Autoencoder, build_autoencoder
from vae.weights.families import FAMILIES, families_of, is_published_network
from vae.weights.safetensors_io import check_range

FORMAT_VERSION = 1
CONFIG_KEY = "vae.config"
ASSUMED = {"assumed": "scaling_factor and shift_factor, since the file they came from does not tell its family"}
ASSUMED_GROUPS = {"assumed": "norm_num_groups, since no configuration came with the tensors and they do not tell it"}
MAX_JSON = 1_000_000  # bytes, and characters, of a configuration


@dataclass(frozen=True)
class Notes:
    """What a weights file of ours states besides its configuration.

    `latents` is what was measured on them, `training` is how the weights came to be, and `architecture` is what of the
    architecture is not known.
    """

    latents: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)


def noting_the_scale(notes: Notes, config: AutoencoderConfig) -> Notes:
    """Mark the scaling factor in `notes` as assumed where it is, and remove the mark where it is known."""
    latents = {name: value for name, value in notes.latents.items() if name not in ASSUMED}
    return replace(notes, latents=latents if config.scale_is_known else latents | ASSUMED)


def to_metadata(config: AutoencoderConfig, notes: Notes) -> dict[str, str]:
    """Return the metadata of a weights file: the configuration with its checksum, the scale, and the notes as JSON."""
    described = json.dumps(asdict(config), sort_keys=True)
    metadata = {
        "vae.format_version": str(FORMAT_VERSION),
        CONFIG_KEY: described,
        "vae.config_sha256": _sha256(described),
        "vae.scaling_factor": json.dumps(config.scaling_factor),
        "vae.shift_factor": json.dumps(config.shift_factor),
    }
    for name, value in asdict(notes).items():
        if value:
            metadata[f"vae.{name}"] = json.dumps(value, sort_keys=True, allow_nan=False)
    return metadata


def read_notes(path: Path, metadata: dict[str, str]) -> Notes:
    """Return the notes in the metadata of the file at `path`; empty ones for a file that is not ours."""
    found = {name: _object(path, f"vae.{name}", metadata.get(f"vae.{name}", "{}")) for name in _NOTED}
    return Notes(**found)


def config_in(path: Path, metadata: dict[str, str]) -> AutoencoderConfig | None:
    """Return the configuration in the metadata, or None where the file is not one of ours.

    Raises WeightsError where the metadata has a newer format version, a wrong checksum or no valid configuration.
    """
    if CONFIG_KEY not in metadata:
        return None

    described = metadata[CONFIG_KEY]
    version = metadata.get("vae.format_version", "1")
    if version != str(FORMAT_VERSION):
        raise WeightsError(f"{path}: written in format version {version}, this vae reads {FORMAT_VERSION}; update vae")
    stated = metadata.get("vae.config_sha256")
    if stated not in (None, _sha256(described)):
        raise WeightsError(f"{path}: its {CONFIG_KEY} is not the one its checksum was made of; export it again")

    # Keys that this version does not know are ignored.
    known = {field.name for field in fields(AutoencoderConfig)}
    values = _object(path, CONFIG_KEY, described)
    try:
        return AutoencoderConfig(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its {CONFIG_KEY} is not a configuration ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file. Raises WeightsError where it is too large, not readable or no object."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise WeightsError(f"{path}: larger than {MAX_JSON:,} bytes; this is no configuration")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not readable ({error})") from error
    return _object(path, "text", text)


def _object(path: Path, key: str, text: str) -> dict[str, Any]:
    """Parse a JSON object. `path` and `key` are for the error. Raises WeightsError where `text` is not one."""
    if len(text) > MAX_JSON:
        raise WeightsError(f"{path}: its {key} is longer than {MAX_JSON:,} characters")
    try:
        values = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its {key} is not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: its {key} is not a JSON object")
    return values


def _finite(text: str) -> float:
    """Parse a number, refusing NaN and Infinity, which are not JSON, and numbers beyond a float, such as 1e400."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_NOTED = [field.name for field in fields(Notes)]


@dataclass(frozen=True)
class WeightsFile:
    """A file, its tensors, and the configuration and notes that came beside or inside it, where there are any."""

    file: Path
    state: State
    config: AutoencoderConfig | None = None
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class LoadedWeights:
    """An autoencoder's tensors under our names, and what the file says about them."""

    file: Path
    state: State
    config: AutoencoderConfig
    layout: str  # "diffusers", "ldm" or "taesd"
    weights: str  # "live" or "EMA"
    family: str | None  # of the diffusion model in the same file, or of a tiny one's latents; None if unknown
    stated: bool  # whether a configuration was given or came with the file, and was not read from the tensors
    others: int  # number of tensors in the file that are not the autoencoder's
    notes: Notes

    @property
    def kind(self) -> str:
        """ "live" or "EMA": which weights these are, or, in an export of ours, which weights were exported."""
        return str(self.notes.training.get("weights", self.weights))

    @property
    def scale_is_known(self) -> bool:
        """Whether the scaling factor is known.

        It is not for a standalone file, where SD and SDXL, or SD3 and FLUX, look alike. Tiny autoencoders need no
        scale.
        """
        return self.config.scale_is_known

    @property
    def groups_are_known(self) -> bool:
        """Whether the number of groups of the norms is known.

        It is not where there are only tensors, which fit any number of groups, and no family says that they are its
        network.
        """
        return not self.notes.architecture.keys() & ASSUMED_GROUPS.keys()

    def with_groups_assumed(self, assumed: bool) -> "LoadedWeights":
        """Return the same weights with the mark of an assumed number of groups, or, if not `assumed`, without.

        The mark goes into every file that is written from them.
        """
        kept = {name: value for name, value in self.notes.architecture.items() if name not in ASSUMED_GROUPS}
        return replace(self, notes=replace(self.notes, architecture=kept | (ASSUMED_GROUPS if assumed else {})))

    def of_family(self, family: str) -> "LoadedWeights":
        """Return the same weights with the constants of `family`, which somebody who knows it has named.

        Raises InputError where the network cannot be that family's.
        """
        config = of_family(self.config, family)
        if config.latents_are_scaled:
            return replace(self, family=family)
        told = replace(self, config=config, stated=True)
        return told.with_groups_assumed(False) if is_published_network(config) else told

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights, counted by elements."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.state.values():
            sizes[tensor.dtype] += tensor.numel()
        return sizes.most_common(1)[0][0]

    def cast(self, target: Path, dtype: torch.dtype | None) -> "LoadedWeights":
        """Return the weights cast to `dtype`, or as they are where it is None.

        Raises WeightsError, naming the file `target`, where `dtype` cannot hold them.
        """
        check_range(target, self.state, dtype)
        return replace(self, state={name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state.items()})

    def build(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Build the model with these weights in `dtype`, in eval mode on the CPU, with gradients enabled."""
        with torch.device("meta"):
            model = build_autoencoder(self.config)
        state = {name: tensor.to(dtype) for name, tensor in self.state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(True).eval()


def of_family(config: AutoencoderConfig, family: str) -> AutoencoderConfig:
    """Return `config` with the scale of `family`. Raises InputError where the network cannot be that family's.

    A tiny autoencoder has no scale and is returned as it is: its latents are those that diffusion models of the family
    see.
    """
    fitting = families_of(config)
    require(family in fitting, f"family={family!r}", f"one of {fitting} for this network")
    return config if config.latents_are_scaled else config.with_scale(*FAMILIES[family])


def check_complete(found: LoadedWeights) -> None:
    """Raise WeightsError unless `found` has every tensor of its architecture, each of its shape, and no other."""
    with torch.device("meta"):
        expected = build_autoencoder(found.config).state_dict()

    missing = sorted(expected.keys() - found.state.keys())
    extra = sorted(found.state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(
            f"{found.file}: {len(missing)} keys missing (first {missing[:3]}) and {len(extra)} unknown (first "
            f"{extra[:3]}) for this architecture; check that it is a complete "
            f"{found.config.kind.network} of its configuration"
        )

    for name, tensor in found.state.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            raise WeightsError(
                f"{found.file}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}; it is of another architecture"
            )
        if not tensor.is_floating_point():
            raise WeightsError(f"{found.file}: {name} is {tensor.dtype}, expected floating-point weights")


def check_finite(found: LoadedWeights) -> None:
    """Raise WeightsError where a tensor has NaN or infinite values."""
    broken = [name for name, tensor in found.state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise WeightsError(
            f"{found.file}: {len(broken)} tensors hold NaN or infinite values (first {broken[:3]}); "
            f"the training that wrote it has diverged, use an earlier file"
        )
