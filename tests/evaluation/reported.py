"""An evaluation to report on, without a model: photographs, and what known kinds of damage make of them."""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vae.evaluation.latents import combine, describe
from vae.evaluation.report.images import Pictures
from vae.evaluation.statistics import compare_pairs, summarise
from vae.metrics.pixel import psnr
from vae.metrics.ssim import ssim
from vae.models.posterior import DiagonalGaussian

Damage = Callable[[Tensor], Tensor]  # uint8 (C, H, W) -> the same


def blurred(image: Tensor) -> Tensor:
    small = F.avg_pool2d(image[None].float(), 2)
    return F.interpolate(small, scale_factor=2, mode="bilinear")[0].round().to(torch.uint8)


def foggy(image: Tensor) -> Tensor:
    return (image.float() * 0.9 + 12.0).round().to(torch.uint8)


def jpeg(image: Tensor) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=60)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


DAMAGES: dict[str, Damage] = {"blurred": blurred, "foggy": foggy, "jpeg": jpeg}


def evaluation(
    images: Mapping[str, Tensor], models: Mapping[str, Damage] = DAMAGES, dataset: str = "photos"
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[tuple[str, int], Pictures]]:
    """The document, the rows and the pictures of `images`, uint8 (3, H, W) by name."""
    rows: list[dict[str, Any]] = []
    pictures: dict[tuple[str, int], Pictures] = {}
    moments: dict[str, list[dict[str, np.ndarray]]] = {model: [] for model in models}
    for index, (name, image) in enumerate(images.items()):
        made = {model: damage(image) for model, damage in models.items()}
        latents = {model: _latents(reconstruction) for model, reconstruction in made.items()}
        pictures[dataset, index] = Pictures(image, made, latents)
        for model, reconstruction in made.items():
            moments[model].append(describe(DiagonalGaussian(latents[model][None], latents[model][None] * 0 - 6.0)))
            about = {"dataset": dataset, "index": index, "image": name, "model": model, "flags": []}
            rows.append(about | {"metrics": _metrics(image, reconstruction)})
    columns = {
        model: {
            metric: np.array([row["metrics"][metric] for row in rows if row["model"] == model])
            for metric in rows[0]["metrics"]
        }
        for model in models
    }
    document = {
        "schema": 1,
        "protocol": {
            "name": "default-v1",
            "version": 1,
            "sha256": "59b9ba92c70a",
            "choices": {"crop": "central square"},
        },
        "resolution": next(iter(images.values())).shape[-1],
        "seed": 0,
        "library": {"vae": "0.1.0", "torch": torch.__version__},
        "models": {model: _about(f"runs/{model}", f"runs/{model}") for model in models},
        "datasets": {dataset: _counted(len(images))},
        "metrics": {dataset: {model: {n: summarise(v) for n, v in by.items()} for model, by in columns.items()}},
        "missing": {"lpips_vgg": "vgg16-397923af.pth is not there; name it, or put it into the folder of torch hub"},
        "comparisons": {dataset: compare_pairs(columns)},
        "latents": {dataset: {model: combine(sums) for model, sums in moments.items()}},
        "robustness": {model: _robustness(number) for number, model in enumerate(models)},
        "precision": {model: _precision(model) for model in models},
    }
    return document, rows, pictures


def crossed(document: dict[str, Any], rows: list[dict[str, Any]], first: str, second: str) -> None:
    """Also the encoder of `first` with the decoder of `second`, which measures as `second` does."""
    name = f"{first} > {second}"
    document["models"][name] = _about(f"runs/{first}", f"runs/{second}")
    for by_model in document["metrics"].values():
        by_model[name] = by_model[second]
    rows += [row | {"model": name} for row in rows if row["model"] == second]


def _about(encoder: str, decoder: str) -> dict[str, Any]:
    shape = {"parameters": 83_653_863, "latent_channels": 4, "downsample_factor": 8}
    return {"encoder": encoder, "decoder": decoder, "sha256": "0123456789ab"} | shape


def _counted(images: int) -> dict[str, Any]:
    return {
        "images": images,
        "sha256": "ba9876543210",
        "left_out": [{"image": "broken.jpg", "reason": "broken.jpg: truncated file"}],
        "enlarged": ["tiny.png"],
        "not_finite": [],
        "identical": [],
    }


def _metrics(image: Tensor, reconstruction: Tensor) -> dict[str, float]:
    a, b = image[None], reconstruction[None]
    x, y = image.double(), reconstruction.double()
    edges = [(p[:, 1:] - p[:, :-1]).abs().mean() for p in (y, x)]
    chroma = [(p - p.mean(dim=0)).square().sum(dim=0).sqrt().mean() for p in (y, x)]
    return {
        "psnr": psnr(a, b).item(),
        "ssim": ssim(a, b).item(),
        "l1": ((x - y).abs().mean() / 255).item(),
        "contrast": (y.mean(dim=0).std() / x.mean(dim=0).std()).item(),
        "saturation": (chroma[0] / chroma[1]).item(),
        "sharpness": (edges[0] / edges[1]).item(),
    }


def _latents(image: Tensor) -> Tensor:
    """(4, h, w) at an eighth of the size: the colours and an edge map."""
    colours = F.avg_pool2d(image[None].double() / 127.5 - 1.0, 8)[0]
    edges = F.avg_pool2d((image[:1, :, 1:].double() - image[:1, :, :-1]).abs()[None], 8, ceil_mode=True)[0] / 32
    return torch.cat([colours, edges])


def _robustness(number: int) -> dict[str, Any]:
    def over(value: float) -> dict[str, Any]:
        return {"mean": value, "identical": 0, "not_finite": 0}

    plain = 29.0 - number
    return {
        "images": 4,
        "pixels": [64, 64],
        "latent_std": 0.9,
        "plain": over(plain),
        "latent_noise": [{"noise": s, "psnr": over(plain - 9 * s)} for s in (0.1, 0.3, 0.5, 1.0)],
        "input_noise": [{"levels": n, "input": over(38.0 - n / 2), "psnr": over(plain - n / 8)} for n in (10, 25)],
        "masked": [
            {"mask": mask, "share": share, "input": over(14.0), "psnr": over(16.0), "input_masked": over(9.1)}
            | {"psnr_masked": over(11.3 + number)}
            for mask, share in (("random", 0.25), ("random", 0.5), ("block", 0.25))
        ],
        "equivariance": [
            {"transform": name, "psnr": over(40.0 - 7 * place - number), "to_image": over(20.0)}
            for place, name in enumerate(("shift", "flip", "rotation", "scale"))
        ],
        "drift": [{"round": n, "psnr": over(plain - (1 + number) * math.log(n))} for n in range(1, 11)],
        "tiled": None,
        "missing": {"tiled": "latents are 8x8 cells, which is one tile of 16x16; measure larger images"},
    }


def _precision(model: str) -> dict[str, Any]:
    return {
        "is_safe": True,
        "verdict": "safe in float16: yes, because the largest activation is 19 of 65,504 (at decoder.conv_in)",
        "headroom": 3447.0,
        "psnr": {"float16": 69.9, "bfloat16": 51.4},
        "largest": [{"layer": "decoder.conv_in", "peak": 19.0}],
    }
