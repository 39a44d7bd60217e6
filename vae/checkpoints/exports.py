"""From what a user names to weights: an export, a weights file or the directory of a run."""

from pathlib import Path

from vae.errors import InputError


def find_export(path: str | Path, key: str = "model") -> Path:
    """The weights meant by `path`: for a run's directory its newest export, else its best; for an export the folder.

    `key` is what an error calls the path.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{key}={str(path)!r}: no such file or folder; name an export, a weights file or a run")
    exports = [*(path / "exports").glob("best"), *sorted((path / "exports").glob("step_*"))]
    if exports:
        path = exports[-1]
    if (path / "checkpoints").is_dir():
        raise InputError(f"{key}={str(path)!r}: a run without an export; vae export {path} makes one of its checkpoint")
    if (path / "diffusers").is_dir():
        return path / "diffusers"
    single = sorted(path.glob("*.vae.safetensors")) if path.parent.name == "exports" else []
    return single[0] if single else path  # diffusers cannot hold every tiny one
