"""From what a user names to a model: an export, a weights file or the directory of a run."""

from pathlib import Path

import torch

from vae.checkpoints import load_autoencoder
from vae.errors import InputError
from vae.models.autoencoder import AutoencoderKL


def find_export(path: str | Path) -> Path:
    """The weights meant by `path`: for a run's directory its newest export, for an export its diffusers folder."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"model={str(path)!r}: no such file or folder; name an export, a weights file or a run")
    steps = sorted((path / "exports").glob("step_*"))
    if steps:
        path = steps[-1]
    if (path / "checkpoints").is_dir():
        raise InputError(f"model={str(path)!r}: a run without an export; vae export {path} makes one of its checkpoint")
    return path / "diffusers" if (path / "diffusers").is_dir() else path


def load_models(paths: list[str]) -> dict[str, AutoencoderKL]:
    """{short distinct name: model}, in the order given."""
    found = [find_export(path) for path in paths]
    return {name: load_autoencoder(path) for name, path in zip(_short_names(paths), found, strict=True)}


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device={name!r} is not to be had ({first}); choose 'auto' or 'cpu'") from error


def _short_names(paths: list[str]) -> list[str]:
    """As many trailing parts of each path as make it unlike the others."""
    for depth in range(1, max(len(Path(path).parts) for path in paths) + 1):
        names = ["/".join(Path(path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"model={paths}: the same model twice; name each once")
