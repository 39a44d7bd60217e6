"""What every codec makes of one image after the other, and its numbers.

On a CPU the networks see one image at a time: kernels sum in another order for another batch size, and the table would
depend on it. On a GPU they see batches of `data.validation_batch_size`, the last filled up, so that the table depends
on that number alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae.data.loading import Batch
from vae.data.transforms import to_model_range
from vae.evaluation.definition import Protocol
from vae.evaluation.latents import describe
from vae.evaluation.models import Codec
from vae.evaluation.rows import Line, packed
from vae.latents import latents_for
from vae.metrics.paired import PairedMetrics
from vae.models.arithmetic import float32_arithmetic
from vae.models.inception import Inception
from vae.models.interface import Autoencoder
from vae.models.posterior import DiagonalGaussian

OF_PROTOCOL = {"psnr", "ssim", "lpips_alex", "lpips_vgg"}  # whose arithmetic the protocol decides


class Made(NamedTuple):
    """Of images (B, C, H, W) in [-1, 1] by one codec; reconstructions are not clamped."""

    posterior: DiagonalGaussian
    latents: Tensor
    reconstructions: Tensor


@dataclass
class Bench:
    """The networks, the protocol and the metrics that all images meet."""

    codecs: list[Codec]
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

    def make(self, images: Tensor, indices: list[int]) -> Iterator[tuple[Codec, Made]]:
        """By each codec; every encoder runs once."""
        posteriors: dict[str, DiagonalGaussian] = {}
        for codec in self.codecs:
            if codec.encoder not in posteriors:
                posteriors[codec.encoder] = self.models[codec.encoder].encode(images)
            posterior = posteriors[codec.encoder]
            latents = self.protocol.latents_of(posterior, indices, self.seed)
            encoder, decoder = self.models[codec.encoder], self.models[codec.decoder]
            decoded = decoder.decode(latents_for(decoder.config, latents, encoder.config))
            yield codec, Made(posterior, latents, decoded)

    @torch.no_grad()
    def measure(self, dataset: str, batch: Batch) -> Iterator[Line]:
        """A line for each image of the batch, and for each that was left out."""
        for index, one in zip(batch.missing, batch.left_out, strict=True):
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
