"""The models that a user names: encoders and decoders, crossed.

What every codec makes of one image after the other, and its numbers.

On a CPU the networks see one image at a time: kernels sum in another order for another batch size, and the table would
depend on it. On a GPU they see batches of `data.validation_batch_size`, the last filled up, so that the table depends
on that number alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.data.loader import Batch
from vae.data.transforms import to_model_range
from vae.errors import InputError, require
from vae.evaluation.latents import describe
from vae.evaluation.protocols import Protocol
from vae.evaluation.results import Line, packed
from vae.latents import latents_for
from vae.metrics.paired import PairedMetrics
from vae.models.arithmetic import float32_arithmetic
from vae.models.base import Autoencoder
from vae.models.inception import Inception
from vae.models.posterior import DiagonalGaussian
from vae.weights import read_autoencoder
from vae.weights.families import families_of
from vae.weights.load import find_export


@dataclass(frozen=True)
class EncoderDecoder:
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


def codecs_of(models: dict[str, Autoencoder], *, cross: bool) -> list[EncoderDecoder]:
    """Each model, and with `cross` each encoder with every other decoder of latents of the same shape."""
    whole = [EncoderDecoder(name, name, name) for name in models]
    if not cross:
        return whole
    pairs = [(a, b) for a, b in permutations(models, 2) if _latents_of(models[a]) == _latents_of(models[b])]
    if not pairs:
        raise InputError("cross=true: no two of the models have latents of the same channels and size; leave it out")
    return whole + [EncoderDecoder(f"{a} > {b}", a, b) for a, b in pairs]


def described(codec: EncoderDecoder, models: Mapping[str, Autoencoder], paths: dict[str, str]) -> dict[str, Any]:
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


OF_PROTOCOL = {"psnr", "ssim", "lpips_alex", "lpips_vgg"}  # whose arithmetic the protocol decides


class Reconstruction(NamedTuple):
    """Of images (B, C, H, W) in [-1, 1] by one codec; reconstructions are not clamped."""

    posterior: DiagonalGaussian
    latents: Tensor
    reconstructions: Tensor


@dataclass
class Evaluator:
    """The networks, the protocol and the metrics that all images meet."""

    codecs: list[EncoderDecoder]
    models: Mapping[str, Autoencoder]
    protocol: Protocol
    metrics: PairedMetrics
    inception: Inception | None
    device: torch.device
    batch_size: int
    seed: int
    conventions: tuple[str, ...] = ()  # of Inception's resizing

    def __post_init__(self) -> None:
        self.others = PairedMetrics(tuple(name for name in self.metrics.names if name not in OF_PROTOCOL))

    @property
    def at_once(self) -> int:
        return 1 if self.device.type == "cpu" else self.batch_size

    def make(self, images: Tensor, indices: list[int]) -> Iterator[tuple[EncoderDecoder, Reconstruction]]:
        """By each codec; every encoder runs once."""
        posteriors: dict[str, DiagonalGaussian] = {}
        for codec in self.codecs:
            if codec.encoder not in posteriors:
                posteriors[codec.encoder] = self.models[codec.encoder].encode(images)
            posterior = posteriors[codec.encoder]
            latents = self.protocol.latents_of(posterior, indices, self.seed)
            encoder, decoder = self.models[codec.encoder], self.models[codec.decoder]
            decoded = decoder.decode(latents_for(decoder.config, latents, encoder.config))
            yield codec, Reconstruction(posterior, latents, decoded)

    @torch.no_grad()
    def measure(self, dataset: str, batch: Batch) -> Iterator[Line]:
        """A line for each image of the batch, and for each that was left out."""
        for index, one in zip(batch.missing, batch.skipped, strict=True):
            about = {"dataset": dataset, "index": index, "image": one.name}
            yield about | {"left_out": one.reason, "is_corrupt": one.is_corrupt}
        for start in range(0, len(batch.images), self.at_once):
            part = slice(start, start + self.at_once)
            indices = batch.positions[part]
            images = to_model_range(batch.images[part].to(self.device))
            absent = self.at_once - len(indices)
            filled = torch.cat([images, images[-1:].expand(absent, -1, -1, -1)])
            lines = self._lines(filled, indices + indices[-1:] * absent)
            of_images = zip(indices, batch.names[part], batch.hashes[part], strict=True)
            for line, (index, name, hashed) in zip(lines, of_images, strict=False):
                about = {"dataset": dataset, "index": index, "image": name, "pixels": hashed}
                yield about | {"enlarged": index in batch.enlarged} | line

    def _lines(self, images: Tensor, indices: list[int]) -> list[Line]:
        lines: list[Line] = [{"features": {}, "models": {}} for _ in indices]
        for codec, made in self.make(images, indices):
            shown, reconstructed = self.protocol.quantised(images, made.reconstructions)
            finite = made.reconstructions.isfinite().flatten(1).all(dim=1).tolist()
            identical = (shown == reconstructed).flatten(1).all(dim=1).tolist()
            numbers = self.protocol.measure(images, made.reconstructions, self.metrics.lpips, self.metrics.names)
            numbers |= self.others(shown, reconstructed)
            columns = {name: numbers[name].tolist() for name in self.metrics.names if name in numbers}
            features = self._features(reconstructed)
            for row, line in enumerate(lines):
                result: dict[str, Any] = {"is_finite": finite[row]}
                if finite[row]:
                    result["is_identical"] = identical[row]
                    result["metrics"] = {name: _plain(column[row]) for name, column in columns.items()}
                    result["features"] = {name: packed(values[row].numpy()) for name, values in features.items()}
                if finite[row] and not codec.is_crossed:
                    one = DiagonalGaussian(made.posterior.mean[row : row + 1], made.posterior.logvar[row : row + 1])
                    result["latents"] = {name: packed(array) for name, array in describe(one).items()}
                line["models"][codec.name] = result
            if not lines[0]["features"]:
                originals = self._features(shown)
                for row, line in enumerate(lines):
                    line["features"] = {name: packed(values[row].numpy()) for name, values in originals.items()}
        return lines

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if self.inception is None:
            return {}
        return {name: self.inception.features(images, name).cpu() for name in self.conventions}


def _plain(value: float) -> float | str:
    """JSON has no infinities."""
    return value if abs(value) < float("inf") else str(value)


@contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """No TF32, no choice of kernels by the clock, a stated number of the CPU's threads; what was set comes back.

    Sums over pixels end in other bits with another number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # float32 within: what cuDNN's flags say of TF32 must not contradict it.
        with float32_arithmetic(), torch.backends.cudnn.flags(True, False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
