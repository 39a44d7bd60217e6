"""What a weights file of ours says about itself, in the metadata of its safetensors header.

The web UIs read none of it; people, `vae inspect` and this library do.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vae.checkpoints.safe import WeightsError
from vae.models.autoencoder import AutoencoderConfig

FORMAT_VERSION = 1
CONFIG_KEY = "vae.config"
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
