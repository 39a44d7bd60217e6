"""The models that a user names: encoders and decoders, crossed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vae.checkpoints import read_autoencoder
from vae.checkpoints.exports import find_export
from vae.checkpoints.families import families_of
from vae.errors import InputError, require
from vae.models.autoencoder_config import AutoencoderConfig
from vae.models.interface import Autoencoder


@dataclass(frozen=True)
class Codec:
    """What is measured: the encoder of one model with the decoder of the same or, named "A > B", of another."""

    name: str
    encoder: str
    decoder: str

    @property
    def is_crossed(self) -> bool:
        return self.encoder != self.decoder


def load_models(paths: list[str], family: str | None = None) -> dict[str, Autoencoder]:
    """{short distinct name: model}, in the order given; `family` is that of those whose file does not tell it."""
    names = short_names(paths, "model")
    found = [read_autoencoder(find_export(path)) for path in paths]
    given = f"family={family!r}, and every model tells its scaling factor"
    require(family is None or not all(one.scale_is_known for one in found), given, "none")
    told = [one if family is None or one.scale_is_known else one.of_family(family) for one in found]
    return {name: one.build() for name, one in zip(names, told, strict=True)}


def check_scales(models: Mapping[str, Autoencoder]) -> None:
    """For those whose latents meet: between a KL and a tiny one they are scaled, so that the factor must be known."""
    for name, model in models.items():
        meets = any(
            other.config.architecture != model.config.architecture and _latents_of(other) == _latents_of(model)
            for other in models.values()
        )
        if meets and not model.config.scale_is_known:
            unknown = f"{name} does not tell its scaling factor, by which a tiny one has its latents"
            raise InputError(f"{unknown}; state it: family= one of {families_of(model.config)}")


def codecs_of(models: dict[str, Autoencoder], *, cross: bool) -> list[Codec]:
    """Each model, and with `cross` each encoder with every other decoder of latents of the same shape."""
    whole = [Codec(name, name, name) for name in models]
    if not cross:
        return whole
    pairs = [(a, b) for a, b in permutations(models, 2) if _latents_of(models[a]) == _latents_of(models[b])]
    if not pairs:
        raise InputError("cross=true: no two of the models have latents of the same channels and size; leave it out")
    return whole + [Codec(f"{a} > {b}", a, b) for a, b in pairs]


def described(codec: Codec, models: Mapping[str, Autoencoder], paths: dict[str, str]) -> dict[str, Any]:
    """What a document says of a codec."""
    encoder, decoder = models[codec.encoder], models[codec.decoder]
    used = [*encoder.encoder.parameters(), *encoder.quant_conv.parameters()]
    used += [*decoder.decoder.parameters(), *decoder.post_quant_conv.parameters()]
    channels, factor = _latents_of(encoder)
    return {
        "encoder": paths[codec.encoder],
        "decoder": paths[codec.decoder],
        "sha256": weights_sha256(encoder) if not codec.is_crossed else None,
        "config_sha256": config_sha256(encoder.config) if not codec.is_crossed else None,
        "parameters": sum(parameter.numel() for parameter in used),
        "architecture": encoder.config.architecture,
        "latent_channels": channels,
        "downsample_factor": factor,
    }


def config_sha256(config: AutoencoderConfig) -> str:
    """Of all that is no tensor: the same weights in other groups, or with another scale, are another function."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Of the tensors' names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device={name!r} is not to be had ({first}); choose 'auto' or 'cpu'") from error


def short_names(paths: list[str], key: str) -> list[str]:
    """As many trailing parts of each path as make it unlike the others."""
    parts = [Path(path).parts if "://" in path else Path(path).expanduser().absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{key}={paths}: the same {key} twice; name each once")


def _latents_of(model: Autoencoder) -> tuple[int, int]:
    return model.config.latent_channels, model.config.downsample_factor
