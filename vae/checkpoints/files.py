"""From a path to named tensors: folders of diffusers, single files, whatever their suffix says they are."""

import json
from dataclasses import fields
from pathlib import Path

from vae.checkpoints.detect import prefix_of
from vae.checkpoints.diffusers import CONFIG_FILE, WEIGHTS_FILE, read_config
from vae.checkpoints.pickles import read_pickle
from vae.checkpoints.safe import State, WeightsError, read_safetensors
from vae.models.autoencoder import AutoencoderConfig

CONFIG_KEY = "vae.config"  # our configuration as JSON in a safetensors file's metadata
STEM = WEIGHTS_FILE.removesuffix(".safetensors")
FOLDER_FILES = (WEIGHTS_FILE, f"{STEM}.fp16.safetensors", f"{STEM}.bin", f"{STEM}.fp16.bin")
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def read_model(path: Path) -> tuple[Path, State, AutoencoderConfig | None]:
    """(the file read, its tensors, the configuration beside or inside it if there is any)."""
    if path.is_dir():
        config = read_config(path / CONFIG_FILE)
        index = path / INDEX_FILE
        file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), index)
        if file is index and index.is_file():
            return index, _read_shards(index), config
        if file is index:
            raise WeightsError(f"{path / WEIGHTS_FILE}: no such file, nor {', '.join(FOLDER_FILES[1:])}, nor shards")
        return file, read_file(file)[0], config
    state, metadata = read_file(path)
    return path, state, _config_in(path, metadata)


def read_file(path: Path) -> tuple[State, dict[str, str]]:
    """(tensors, metadata) of one file, by its first bytes: safetensors, or PyTorch's pickle, which has no metadata."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    is_pickle = start[8:] != b"{" and start.startswith((b"PK", b"\x80"))  # safetensors: 8 bytes of length, then JSON
    return (read_pickle(path), {}) if is_pickle else read_safetensors(path, lambda names: prefix_of(names) or "")


def _read_shards(index: Path) -> State:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not an index of shards ({error!r})") from error
    state: State = {}
    for name in sorted(map(str, names)):
        if Path(name).name != name:
            raise WeightsError(f"{index}: names the shard {name!r} outside its folder; refused")
        state |= read_safetensors(index.parent / name)[0]
    return state


def _config_in(path: Path, metadata: dict[str, str]) -> AutoencoderConfig | None:
    if CONFIG_KEY not in metadata:
        return None
    known = {field.name for field in fields(AutoencoderConfig)}
    try:
        values = json.loads(metadata[CONFIG_KEY])
        return AutoencoderConfig(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its {CONFIG_KEY} is not a configuration ({error})") from error
