"""Read named tensors from a path: an export, a run's directory, a folder of diffusers or a single file.

What kind of file it is is decided by its first bytes, never by its suffix.
"""

from pathlib import Path

from vae.errors import InputError
from vae.files import State, WeightsError
from vae.run_dir import FILE_ENDING, RunDir, step_name
from vae.weights.formats import CONFIG_FILE, WEIGHTS_FILE, autoencoder_names, read_config
from vae.weights.loaded import WeightsFile, config_in, read_json, read_notes
from vae.weights.pickle_io import read_pickle
from vae.weights.safetensors_io import read_safetensors
from vae.weights.taesd import HALVES, file_of_half, from_pair, is_half, pair_in

STEM = WEIGHTS_FILE.removesuffix(".safetensors")
PREFERRED = (  # weights in a folder: full precision first, safetensors before pickles, whole before sharded
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}.index.json",
    f"{STEM}.bin",
    f"{STEM}.bin.index.json",
    f"{STEM}.fp16.safetensors",
    f"{WEIGHTS_FILE}.index.fp16.json",
    f"{STEM}.fp16.bin",
)
LONGEST_NAME = 255  # bytes; the limit of file systems
PIPELINE_PART = "vae"  # where a whole diffusion pipeline keeps its autoencoder


def read_source(path: Path) -> WeightsFile:
    """Read the tensors at `path`, with the configuration and the notes that come with them.

    `path` is a single file, one file of a published tiny pair (both are read), a folder of diffusers, a whole pipeline,
    or a folder with one pair. In a full checkpoint only the autoencoder is read. Raises WeightsError where there are no
    weights.
    """
    if not path.is_dir():
        state, metadata = read_file(path)
        beside = path.parent / CONFIG_FILE
        in_folder = path.name in PREFERRED and beside.is_file()
        state = _whole(path) if is_half(state) else state
        config = read_config(beside) if in_folder else config_in(path, metadata)
        return WeightsFile(path, state, config, read_notes(path, metadata))

    if not (path / CONFIG_FILE).is_file() and (path / PIPELINE_PART / CONFIG_FILE).is_file():
        path = path / PIPELINE_PART
    config = read_config(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else None

    file = next((path / name for name in PREFERRED if (path / name).is_file()), None)
    pair = pair_in(path) if file is None and config is None else None
    if pair is not None:
        return read_source(pair)
    if file is None:
        raise WeightsError(f"{path / WEIGHTS_FILE}: no such file, nor {', '.join(PREFERRED[1:])}; fetch it again")

    if file.suffix == ".json":
        return WeightsFile(file, _read_shards(file), config)
    state, metadata = read_file(file)
    return WeightsFile(file, state, config, read_notes(file, metadata))


def _whole(half: Path) -> State:
    """Read both files of a published pair, of which `half` is one. Raises WeightsError where the other is missing."""
    files = [file_of_half(half, which) for which in HALVES]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{half}: one half of a tiny autoencoder; put the other, {file.name}, beside it")
    return from_pair(*(read_file(file)[0] for file in files))


def is_pickle(path: Path) -> bool:
    """Return whether a file is PyTorch's pickle, by its first bytes.

    A safetensors file begins with 8 bytes of length and then JSON, so it is never taken for one. Raises WeightsError
    where there is no such file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] != b"{" and start.startswith((b"PK", b"\x80"))


def read_file(path: Path) -> tuple[State, dict[str, str]]:
    """Read one file: (tensors, metadata). Pickles have no metadata.

    Of a full checkpoint only the autoencoder is read; its other tensors are on "meta".
    """
    if is_pickle(path):
        return read_pickle(path, autoencoder_names), {}
    return read_safetensors(path, autoencoder_names)


def _read_shards(index: Path) -> State:
    """Read the shards that an index names.

    Raises WeightsError where it is not an index, or where it names a file outside its folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise WeightsError(f"{index}: not an index of shards; fetch it again")

    state: State = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise WeightsError(f"{index}: names the shard {name!r} outside its folder, or by no name; refused")
        state |= read_file(index.parent / name)[0]
    return state


def which_export(path: str | Path) -> str:
    """Say which export of a run `find_export` takes, or "" where there is no choice."""
    run = RunDir(path)
    taken = run.published()
    if taken is None:
        return ""

    newest = run.exported()[-1]
    if taken != run.best:
        return f"the newest export of {run.path}, {newest.name}; it has no best one"
    best = read_json(run.best_record)
    if newest.name in (run.best.name, step_name(best["updates"])):
        return ""
    return (
        f"the best export of {run.path}, of update {best['updates']} by {best['metric']}; the newest is {newest.name}"
    )


def find_export(path: str | Path, key: str = "model") -> Path:
    """Return the weights that `path` means.

    For a run's directory that is its best export, else its newest one by step; for an export it is the folder of
    diffusers or, where diffusers cannot hold the network, the single file. `key` is what an error calls the path.
    Raises InputError where nothing is there, or where a run has no export yet.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{key}={str(path)!r}: no such file or folder; name an export, a weights file or a run")

    path = RunDir(path).published() or path
    if RunDir(path).checkpoints.is_dir():
        raise InputError(f"{key}={str(path)!r}: a run without an export; vae export {path} makes one of its checkpoint")

    if (path / "diffusers").is_dir():
        return path / "diffusers"
    single = sorted(path.glob(f"*{FILE_ENDING}")) if RunDir.of_export(path) is not None else []
    return single[0] if single else path  # diffusers cannot hold every tiny autoencoder
