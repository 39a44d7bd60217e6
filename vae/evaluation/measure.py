"""Measurement of images: the models that a user names, encoders and decoders crossed, and the numbers of each image.

On a CPU the networks see one image at a time. Kernels sum in another order for another batch size, so the table would
depend on it. On a GPU they see batches of `data.validation_batch_size`, and the last one is filled up, so that the
table depends on that number alone.
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
from vae.evaluation.results import SKIPPED, Line
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
    """What is measured: the encoder of one model with the decoder of the same model or, named "A > B", of another."""

    name: str
    encoder: str
    decoder: str

    @property
    def is_crossed(self) -> bool:
        """Whether encoder and decoder belong to different models."""
        return self.encoder != self.decoder


def load_models(paths: list[str], family: str | None = None) -> dict[str, Autoencoder]:
    """Load models as {short distinct name: model}, in the order given.

    `family` applies to the models whose files do not record a scaling factor. Raises InputError if it is given and all
    of them do.
    """
    names = short_names(paths, "model")
    found = [read_autoencoder(find_export(path)) for path in paths]

    given = f"family={family!r}, and every model tells its scaling factor"
    require(family is None or not all(one.scale_is_known for one in found), given, "none")
    told = [one if family is None or one.scale_is_known else one.of_family(family) for one in found]
    return {name: one.build() for name, one in zip(names, told, strict=True)}


def check_scales(models: Mapping[str, Autoencoder]) -> None:
    """Check that scaling factors are known where latents of a KL and a tiny autoencoder meet.

    These latents have to be rescaled, because a tiny autoencoder has scaled ones. Raises InputError if a factor is not
    known.
    """
    for name, model in models.items():
        others = [one for one in models.values() if _latents_of(one) == _latents_of(model)]
        meets = any(one.config.latents_are_scaled != model.config.latents_are_scaled for one in others)
        if meets and not model.config.scale_is_known:
            unknown = f"{name} does not tell its scaling factor, by which a tiny one has its latents"
            raise InputError(f"{unknown}; state it: family= one of {families_of(model.config)}")


def codecs_of(models: dict[str, Autoencoder], *, cross: bool) -> list[EncoderDecoder]:
    """Return each model, and with `cross` also each encoder with every other decoder of latents of the same shape.

    Raises InputError if `cross` is asked for and no two models have latents of the same shape.
    """
    whole = [EncoderDecoder(name, name, name) for name in models]
    if not cross:
        return whole
    pairs = [(a, b) for a, b in permutations(models, 2) if _latents_of(models[a]) == _latents_of(models[b])]
    if not pairs:
        raise InputError("cross=true: no two of the models have latents of the same channels and size; leave it out")
    return whole + [EncoderDecoder(f"{a} > {b}", a, b) for a, b in pairs]


def described(codec: EncoderDecoder, models: Mapping[str, Autoencoder], paths: dict[str, str]) -> dict[str, Any]:
    """Describe a codec as the document stores it: paths, hashes, parameters and the shape of its latents."""
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
    """Hash everything in a configuration, which weights do not tell.

    Equal weights with other groups of the normalisation, or with another scale, are another function.
    """
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU if there is one, else the CPU.

    Raises InputError if the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device={name!r} is not to be had ({first}); choose 'auto' or 'cpu'") from error


def short_names(paths: list[str], key: str) -> list[str]:
    """Shorten paths to the fewest trailing parts that tell them apart.

    Raises InputError, naming `key`, if a path is given twice.
    """
    parts = [Path(path).parts if "://" in path else Path(path).expanduser().absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{key}={paths}: the same {key} twice; name each once")


def _latents_of(model: Autoencoder) -> tuple[int, int]:
    """Return the number of latent channels and the downsampling factor."""
    return model.config.latent_channels, model.config.downsample_factor


OF_PROTOCOL = {"psnr", "ssim", "lpips_alex", "lpips_vgg"}  # metrics whose arithmetic the protocol decides


class Reconstruction(NamedTuple):
    """What one codec makes of images (B, C, H, W) in [-1, 1]; reconstructions are not clamped."""

    posterior: DiagonalGaussian
    latents: Tensor
    reconstructions: Tensor


@dataclass
class Evaluator:
    """The networks, the protocol and the metrics, which are the same for all images.

    `inception` is None if no metric of whole sets is measured.
    """

    codecs: list[EncoderDecoder]
    models: Mapping[str, Autoencoder]
    protocol: Protocol
    metrics: PairedMetrics
    inception: Inception | None
    device: torch.device
    batch_size: int
    seed: int
    conventions: tuple[str, ...] = ()  # how images are resized for Inception

    def __post_init__(self) -> None:
        """Keep apart the metrics whose arithmetic the protocol does not decide."""
        self.others = PairedMetrics(tuple(name for name in self.metrics.names if name not in OF_PROTOCOL))

    @property
    def at_once(self) -> int:
        """The number of images that the networks see together."""
        return 1 if self.device.type == "cpu" else self.batch_size

    def make(self, images: Tensor, indices: list[int]) -> Iterator[tuple[EncoderDecoder, Reconstruction]]:
        """Reconstruct images (B, C, H, W) in [-1, 1] with each codec; every encoder runs once.

        `indices` are the positions of the images in their data set, and seed the noise of sampled latents.
        """
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
        """Yield a row for each image of the batch, and for each image that was skipped."""
        for index, one in zip(batch.missing, batch.skipped, strict=True):
            about = {"dataset": dataset, "index": index, "image": one.name}
            yield about | {SKIPPED: one.reason, "is_corrupt": one.is_corrupt}

        for start in range(0, len(batch.images), self.at_once):
            part = slice(start, start + self.at_once)
            indices = batch.positions[part]
            images = to_model_range(batch.images[part].to(self.device))

            # The last batch is filled up by repeating its last image, and rows of the copies are dropped.
            absent = self.at_once - len(indices)
            filled = torch.cat([images, images[-1:].expand(absent, -1, -1, -1)])
            lines = self._lines(filled, indices + indices[-1:] * absent)
            of_images = zip(indices, batch.names[part], batch.hashes[part], strict=True)

            for line, (index, name, hashed) in zip(lines, of_images, strict=False):
                about = {"dataset": dataset, "index": index, "image": name, "pixels": hashed}
                yield about | {"enlarged": index in batch.enlarged} | line

    def _lines(self, images: Tensor, indices: list[int]) -> list[Line]:
        """Measure images (B, C, H, W) with all codecs; returns a row for each of them."""
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
                    result["features"] = {name: values[row].numpy() for name, values in features.items()}

                # Latents belong to the encoder: a crossed codec would only repeat those of its encoder's own model.
                if finite[row] and not codec.is_crossed:
                    one = DiagonalGaussian(made.posterior.mean[row : row + 1], made.posterior.logvar[row : row + 1])
                    result["latents"] = describe(one)
                line["models"][codec.name] = result

            # The features of the images themselves are the same for all codecs.
            if not lines[0]["features"]:
                originals = self._features(shown)
                for row, line in enumerate(lines):
                    line["features"] = {name: values[row].numpy() for name, values in originals.items()}
        return lines

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        """Return Inception features of uint8 images by convention, on the CPU; empty without Inception."""
        if self.inception is None:
            return {}
        return {name: self.inception.features(images, name).cpu() for name in self.conventions}


def _plain(value: float) -> float | str:
    """Turn infinities and NaN into strings, since JSON has neither."""
    return value if abs(value) < float("inf") else str(value)


@contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Compute reproducibly within the context: no TF32, deterministic kernels, `threads` CPU threads.

    cuDNN chooses no kernels by timing. The number of threads is fixed because it changes the last bits of sums over
    pixels. It is restored at the end, like all other settings.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # allow_tf32=False, because cuDNN's flags must not contradict the float32 arithmetic set beside them.
        with float32_arithmetic(), torch.backends.cudnn.flags(True, False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
