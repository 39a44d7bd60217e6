"""What a weights file of ours says about itself, in the metadata of its safetensors header.

The web UIs read none of it; people, `vae inspect` and this library do.


What was read from a path, and the autoencoder that was found in it."""

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
from vae.models.base import Autoencoder
from vae.models.registry import build_autoencoder
from vae.weights.families import FAMILIES, families_of, is_published_network
from vae.weights.safetensors_io import check_range

FORMAT_VERSION = 1
CONFIG_KEY = "vae.config.schema"
ASSUMED = {"assumed": "scaling_factor and shift_factor, since the file they came from does not tell its family"}
ASSUMED_GROUPS = {"assumed": "norm_num_groups, since no configuration came with the tensors and they do not tell it"}
MAX_JSON = 1_000_000  # bytes of a configuration


@dataclass(frozen=True)
class Notes:
    """Beside the configuration. `latents`: what was measured on them; `training`: how the weights came to be.

    `architecture`: what of it is not known.
    """

    latents: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)


def noting_the_scale(notes: Notes, config: AutoencoderConfig) -> Notes:
    """`notes` that say of a scaling factor that is assumed that it is, and of none that is known."""
    latents = {name: value for name, value in notes.latents.items() if name not in ASSUMED}
    return replace(notes, latents=latents if config.scale_is_known else latents | ASSUMED)


def to_metadata(config: AutoencoderConfig, notes: Notes) -> dict[str, str]:
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
    found = {name: _object(path, f"vae.{name}", metadata.get(f"vae.{name}", "{}")) for name in _NOTED}
    return Notes(**found)


def config_in(path: Path, metadata: dict[str, str]) -> AutoencoderConfig | None:
    """The configuration in the metadata, or None where it is somebody else's file."""
    if CONFIG_KEY not in metadata:
        return None
    version, described = metadata.get("vae.format_version", "1"), metadata[CONFIG_KEY]
    if version != str(FORMAT_VERSION):
        raise WeightsError(f"{path}: written in format version {version}, this vae reads {FORMAT_VERSION}; update vae")
    stated = metadata.get("vae.config_sha256")
    if stated not in (None, _sha256(described)):
        raise WeightsError(f"{path}: its {CONFIG_KEY} is not the one its checksum was made of; export it again")
    known = {field.name for field in fields(AutoencoderConfig)}
    values = _object(path, CONFIG_KEY, described)
    try:
        return AutoencoderConfig(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its {CONFIG_KEY} is not a configuration ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a small file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise WeightsError(f"{path}: larger than {MAX_JSON:,} bytes; this is no configuration")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not readable ({error})") from error
    return _object(path, "text", text)


def _object(path: Path, key: str, text: str) -> dict[str, Any]:
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
    """NaN and Infinity are no JSON, and 1e400 is no number of a computer's."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_NOTED = [field.name for field in fields(Notes)]


@dataclass(frozen=True)
class WeightsFile:
    """`file`, its tensors, and what stands beside or inside them, if anything does."""

    file: Path
    state: State
    config: AutoencoderConfig | None = None
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class LoadedWeights:
    """An autoencoder's tensors under our names, and what was learned on the way."""

    file: Path
    state: State
    config: AutoencoderConfig
    layout: str  # "diffusers", "ldm" or "taesd"
    weights: str  # "live" or "EMA"
    family: str | None  # of the diffusion model beside it, or whose latents a tiny one has; None where nothing tells
    stated: bool  # whether the configuration came from a file, and not from the tensors
    others: int  # tensors in the file beside these
    notes: Notes

    @property
    def kind(self) -> str:
        """Live or EMA: which of its weights they are, or, in an export of ours, which were put there."""
        return str(self.notes.training.get("weights", self.weights))

    @property
    def scale_is_known(self) -> bool:
        """Not of a standalone file: SD and SDXL, or SD3 and FLUX, look alike there. Tiny ones need no scale."""
        return self.config.scale_is_known

    @property
    def groups_are_known(self) -> bool:
        """Not of tensors alone, where no family says that they are of its network: they fit any number of groups."""
        return not self.notes.architecture.keys() & ASSUMED_GROUPS.keys()

    def with_groups_assumed(self, assumed: bool) -> "LoadedWeights":
        """The same with the mark, which goes into every file that is written of it, or without."""
        kept = {name: value for name, value in self.notes.architecture.items() if name not in ASSUMED_GROUPS}
        return replace(self, notes=replace(self.notes, architecture=kept | (ASSUMED_GROUPS if assumed else {})))

    def of_family(self, family: str) -> "LoadedWeights":
        """The same with the constants of `family`, which somebody who knows has named."""
        config = of_family(self.config, family)
        if config.architecture == "tiny":
            return replace(self, family=family)
        told = replace(self, config=config, stated=True)
        return told.with_groups_assumed(False) if is_published_network(config) else told

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the weights."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.state.values():
            sizes[tensor.dtype] += tensor.numel()
        return sizes.most_common(1)[0][0]

    def cast(self, target: Path, dtype: torch.dtype | None) -> "LoadedWeights":
        """The weights as `target` will have them; refused where `dtype` cannot hold them."""
        check_range(target, self.state, dtype)
        return replace(self, state={name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state.items()})

    def build(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """The model, in eval mode."""
        with torch.device("meta"):
            model = build_autoencoder(self.config)
        state = {name: tensor.to(dtype) for name, tensor in self.state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(True).eval()


def of_family(config: AutoencoderConfig, family: str) -> AutoencoderConfig:
    """`config` with the constants of `family`; raises InputError where its latents cannot be that one's.

    A tiny autoencoder has none: its latents are those that the family's diffusion models see.
    """
    fitting = families_of(config)
    require(family in fitting, f"family={family!r}", f"one of {fitting} for this network")
    return config if config.architecture == "tiny" else config.with_scale(*FAMILIES[family])


def check_complete(found: LoadedWeights) -> None:
    """Every tensor of the architecture, of its shape, and no other."""
    with torch.device("meta"):
        expected = build_autoencoder(found.config).state_dict()
    kind = {"kl": "KL", "tiny": "tiny"}[found.config.architecture]
    missing, extra = sorted(expected.keys() - found.state.keys()), sorted(found.state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(
            f"{found.file}: {len(missing)} keys missing (first {missing[:3]}) and {len(extra)} unknown (first "
            f"{extra[:3]}) for this architecture; check that it is a complete {kind} autoencoder of its configuration"
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
    broken = [name for name, tensor in found.state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise WeightsError(
            f"{found.file}: {len(broken)} tensors hold NaN or infinite values (first {broken[:3]}); "
            f"the training that wrote it has diverged, use an earlier file"
        )
