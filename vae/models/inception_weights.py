"""Where the weights of FID's Inception come from: a file the user names, torch hub's folder, or a download.

The file is torch-fidelity's and pytorch-fid's, the same bytes under two names. Nothing in it is executed.
"""

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vae.errors import InputError
from vae.models.features import MissingBackboneError

FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"


def find_weights(path: str | Path | None, *, download: bool) -> Path:
    """The file to read: in torch hub's folder only the published one; any other .pth that is named is warned of."""
    if path is not None:
        return _named(Path(path).expanduser())
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for known in (folder / name for name in FILES):
        if known.is_file():
            if _sha256(known) != SHA256:
                raise InputError(f"{known} is damaged: its sha256 is not {SHA256}; delete it and fetch it again")
            return known
    if download and _fetch(folder / FILES[0]):
        return folder / FILES[0]
    raise MissingBackboneError(
        f"rFID and KID need the Inception weights {FILES[0]} (95 MB, sha256 {SHA256}), and they are not in {folder}. "
        f"Remedies: (1) curl -L --create-dirs -o {folder / FILES[0]} {URL}; (2) copy the file, which pytorch-fid calls "
        f"{FILES[1]}, into that folder; (3) name a .pth or .safetensors file with the same keys"
    )


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `path` that `wanted` names, of the shapes that it has."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: damaged, or not safetensors or a state_dict ({error})") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    wrong = [key for key, shape in shapes.items() if key not in state or tuple(state[key].shape) != shape]
    if wrong:
        raise InputError(f"{path}: not FID's Inception v3; {len(wrong)} of {len(shapes)} tensors differ, as {wrong[0]}")
    if any(key.startswith("AuxLogits.") for key in state):
        raise InputError(f"{path}: torchvision's Inception v3, which has the names of FID's and other weights")
    return {key: state[key].float() for key in shapes}


def _named(path: Path) -> Path:
    if not path.is_file():
        raise MissingBackboneError(f"{path}: no such file; expected the Inception weights {FILES[0]}")
    if path.suffix != ".safetensors" and _sha256(path) != SHA256:
        warnings.warn(f"{path}: not the published Inception weights; rFID will not compare with others'", stacklevel=3)
    return path


def _fetch(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
    except (OSError, RuntimeError):  # no network, or not the file that is expected
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
