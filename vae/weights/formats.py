"""What a weights file has to do with an architecture: how tensors and settings are called there, and who can load it.

`Format` is the interface, and the plain case: our own names, which no other program reads. Each architecture has a
format of its own in vae/weights/FILE_FORMAT.py, called FORMAT.
"""

from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from vae.config.model import ARCHITECTURES, Architecture, AutoencoderConfig
from vae.files import State, WeightsError
from vae.weights.families import looks_like
from vae.weights.loaded import LoadedWeights, WeightsFile, read_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WRITTEN_FOR = "0.32.0"  # the oldest diffusers whose AutoencoderKL has every field written here
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ANCHOR = "decoder.conv_in.weight"


class Format:
    """The published files of one architecture."""

    words = "vae's own names"  # of the tensors in the single file, for people
    never_cast: tuple[str, ...] = ()  # names of constants in the single file, which keep their type

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    @property
    def kind(self) -> Architecture:
        """What the configuration knows of the architecture."""
        return ARCHITECTURES[self.architecture]

    def names(self, names: Iterable[str]) -> set[str]:
        """Return those `names` of a file's tensors that may belong to such an autoencoder. The others are not read."""
        return {name for name in names if name.startswith(PARTS)}

    def find(self, source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool) -> LoadedWeights | None:
        """Find such an autoencoder in `source`, and return its tensors under our names, or None where there is none.

        `config` is a configuration that the user states; it replaces the one in `source`. `ema` takes the EMA weights
        of a training checkpoint. Raises WeightsError where the autoencoder is not whole.
        """
        known = config or source.config
        if known is None or known.architecture != self.architecture:
            return None
        self.refuse_ema(source.file, ema=ema)
        return LoadedWeights(source.file, source.state, known, "diffusers", "live", None, True, 0, source.notes)

    def refuse_ema(self, path: Path, *, ema: bool) -> None:
        """Raise WeightsError where EMA weights are asked for: only KL autoencoders have them in one file."""
        if ema:
            raise WeightsError(f"{path}: a {self.architecture} autoencoder without EMA weights; load the live ones")

    def check_kind(self, path: Path, config: AutoencoderConfig) -> None:
        """Raise WeightsError where the tensors are such an autoencoder's, and `config` is another's."""
        if config.architecture != self.architecture:
            stated = f"the configuration is of architecture {config.architecture}; leave that out"
            raise WeightsError(f"{path}: its tensors are of architecture {self.architecture}, but {stated}")

    def to_files(self, state: State, config: AutoencoderConfig, path: Path, family: str | None) -> dict[Path, State]:
        """Return {file: its tensors under published names} for the single file `path`, of a `family` if it is known."""
        return {path: state}

    def to_diffusers(self, config: AutoencoderConfig) -> dict[str, Any]:
        """Return the `config.json` of a folder. Raises WeightsError where diffusers has no place for a setting."""
        return {"_class_name": self.kind.network, "_diffusers_version": WRITTEN_FOR, **asdict(config)}

    def from_diffusers(self, values: dict[str, Any], path: Path) -> AutoencoderConfig:
        """Return the configuration in a `config.json`. Raises WeightsError, naming `path`, where it cannot be built."""
        known = {one.name for one in fields(AutoencoderConfig)}
        try:
            return AutoencoderConfig(**{name: value for name, value in values.items() if name in known})
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path}: {error}") from error

    def clients(self, config: AutoencoderConfig) -> list[str]:
        """List the programs that load a network of this configuration."""
        return []

    def oddities(self, config: AutoencoderConfig) -> list[str]:
        """List the settings of a network that no web UI supports, in words."""
        return []

    def about_clients(self, config: AutoencoderConfig) -> list[str]:
        """Warn where only some programs can load the network."""
        return ["no other program can load it"]

    def about_scale(self, config: AutoencoderConfig, family: str | None) -> list[str]:
        """Warn where programs will use another scale than the configuration states."""
        return []


def format_of(architecture: str) -> Format:
    """Return the format of an architecture: FORMAT in the module of vae/weights that its entry names."""
    return import_module(f"vae.weights.{ARCHITECTURES[architecture].file_format}").FORMAT


def find_autoencoder(source: WeightsFile, config: AutoencoderConfig | None, *, ema: bool = False) -> LoadedWeights:
    """Find the autoencoder in `source`, and return its tensors under our names.

    `config` is a configuration that the user states; it replaces the one in `source`. Where there is neither, the
    architecture is read from the tensors. `ema` takes the EMA weights of a training checkpoint, which must be complete.
    They are also taken where the file has no other weights. Raises WeightsError where no autoencoder is found.
    """
    stated = config or source.config

    # The architecture that is stated comes first, since another may have tensors of the same names.
    names = sorted(ARCHITECTURES, key=lambda name: stated is None or name != stated.architecture)
    for name in names:
        found = format_of(name).find(source, config, ema=ema)
        if found is not None:
            return found
    raise WeightsError(f"{source.file}: no {ANCHOR} in it; {looks_like(source.state)}")


def autoencoder_names(names: Iterable[str]) -> set[str]:
    """Return the names of a file's tensors that belong to its autoencoder, EMA weights included."""
    names = list(names)
    return set().union(*(format_of(architecture).names(names) for architecture in ARCHITECTURES))


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the `config.json` of an autoencoder, with every field of diffusers' class.

    Raises WeightsError where a setting has no place there.
    """
    return format_of(config.architecture).to_diffusers(config)


def from_diffusers_config(values: dict[str, Any], path: Path) -> AutoencoderConfig:
    """Return the configuration that the `values` of a `config.json` describe.

    `path` is for the error. Raises WeightsError where they describe another kind of model, or a setting that this
    library cannot build.
    """
    kinds = {one.network: name for name, one in ARCHITECTURES.items()}
    kind = values.get("_class_name", ARCHITECTURES["kl"].network)
    if kind not in list(kinds):  # it may be of any type
        expected = " or ".join(map(repr, kinds))
        raise WeightsError(f"{path}: _class_name is {kind!r}, expected {expected}; this is another kind of model")
    return format_of(kinds[kind]).from_diffusers(values, path)


def read_config(path: Path) -> AutoencoderConfig:
    """Read a `config.json`. Raises WeightsError as `from_diffusers_config` does, or where the file is not readable."""
    return from_diffusers_config(read_json(path), path)
