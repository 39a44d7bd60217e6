"""The parts of loading, each with what else there is for it: decoders of JPEG, and filters that make 256 pixels."""

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from measuring import Variants
from peers import SIDE, WHOLE, OurWindow
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vae.data.decode import open_image

Box = tuple[int, int, int, int]  # left, top, right, bottom
Cut = tuple[Image.Image, Tensor, Box]  # the same pixels twice, and a window of them
BICUBIC = Image.Resampling.BICUBIC


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Bytes -> uint8 (H, W, 3). Those of other packages where they can be imported."""
    found = {
        "Pillow": _pillow,
        "Pillow, draft(256)": lambda data: _pillow(data, is_draft=True),
        "torchvision.io.decode_image": _torchvision,
        "ours: open_image": lambda data: open_image(data).permute(1, 2, 0).numpy(),
    }
    if simplejpeg := _optional("simplejpeg"):
        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
        found["simplejpeg, fast DCT and upsampling"] = lambda data: simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=True
        )
    if turbo := _optional("turbojpeg"):
        decoder = turbo.TurboJPEG(os.environ.get("LIBTURBOJPEG"))
        found["PyTurboJPEG"] = lambda data: decoder.decode(data, pixel_format=turbo.TJPF_RGB)
    if imagecodecs := _optional("imagecodecs"):
        found["imagecodecs"] = lambda data: imagecodecs.jpeg8_decode(data, outcolorspace="RGB")
    return found


FILTERS: dict[str, Callable[[Cut], Image.Image | Tensor]] = {
    "Pillow: crop, resize": lambda cut: cut[0].crop(cut[2]).resize((SIDE, SIDE), BICUBIC),
    "Pillow: resize(box)": lambda cut: cut[0].resize((SIDE, SIDE), BICUBIC, box=cut[2]),
    "Pillow: resize(box, reducing_gap=2)": lambda cut: cut[0].resize((SIDE, SIDE), BICUBIC, cut[2], 2.0),
    "ours: v2 uint8 bicubic": lambda cut: _resize(_window(cut), InterpolationMode.BICUBIC),
    "v2 float32 bicubic": lambda cut: _resize(_window(cut).float(), InterpolationMode.BICUBIC),
    "v2 uint8 bilinear": lambda cut: _resize(_window(cut), InterpolationMode.BILINEAR),
}


def cuts(datas: list[bytes]) -> list[Cut]:
    """Of each image a random largest square, and its pixels for Pillow and for torch as their decoders leave them."""
    window = OurWindow(WHOLE)
    pictures = [Image.fromarray(_pillow(data)) for data in datas]
    boxes = [window.draw(picture.height, picture.width) for picture in pictures]
    tensors = [torch.from_numpy(_torchvision(data)).permute(2, 0, 1) for data in datas]
    return list(zip(pictures, tensors, boxes, strict=True))


def passes(parts: dict[str, Callable[[Any], object]], items: Sequence[Any], batch_size: int) -> Variants:
    """Each part over all items, a batch a step."""

    def begin(part: Callable[[Any], object]) -> Callable[[], Iterator[object]]:
        def steps() -> Iterator[object]:
            for start in range(0, len(items), batch_size):
                yield [part(item) for item in items[start : start + batch_size]]

        return steps

    return {name: begin(part) for name, part in parts.items()}


def differences(parts: dict[str, Callable[[Any], Any]], items: Sequence[Any]) -> dict[str, str]:
    """From the first part, in levels: the largest, and the mean over all images. Other sizes are compared at 256."""
    reference, *_ = parts.values()
    found = {name: np.zeros((len(items), 2)) for name in parts}
    for number, item in enumerate(items):
        expected = as_levels(reference(item))
        for name, part in parts.items():
            found[name][number] = difference(as_levels(part(item)), expected)
    return {
        name: f"{most.max():.0f} / {mean.mean():.4f}" for name, (most, mean) in ((n, f.T) for n, f in found.items())
    }


def difference(given: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """(largest, mean) absolute difference of two uint8 (H, W, C)."""
    if given.shape != expected.shape:
        given, expected = (np.asarray(Image.fromarray(one).resize((SIDE, SIDE), BICUBIC)) for one in (given, expected))
    apart = np.abs(given.astype(np.int16) - expected)
    return int(apart.max()), float(apart.mean())


def as_levels(pixels: Any) -> np.ndarray:
    """uint8 (H, W, C) of a picture, an array (H, W, C) or a tensor (C, H, W)."""
    if isinstance(pixels, Tensor):
        return pixels.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.asarray(pixels)


def _pillow(data: bytes, is_draft: bool = False) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if is_draft:
        image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.convert("RGB"))


def _torchvision(data: bytes) -> np.ndarray:
    return (
        decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    )


def _window(cut: Cut) -> Tensor:
    left, top, right, bottom = cut[2]
    return cut[1][:, top:bottom, left:right]


def _resize(pixels: Tensor, mode: InterpolationMode) -> Tensor:
    return TF.resize(pixels, [SIDE, SIDE], mode, antialias=True)


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
