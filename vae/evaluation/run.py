"""`evaluate`: one or several autoencoders on the same images, image by image."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import vae
from vae.checkpoints.safe import WeightsError, replacing, write_text
from vae.config import EvaluateConfig
from vae.data.loading import Batch, LeftOut, validation_loader
from vae.data.opening import open_sources
from vae.data.pixels import as_depth
from vae.data.transforms import to_model_range, to_uint8
from vae.errors import BAD_IMAGES, InputError, Stopped
from vae.evaluation.models import find_device, load_models
from vae.evaluation.protocol import DEFAULT_V1
from vae.metrics.paired import HIGHER_IS_BETTER, PairedMetrics
from vae.models.autoencoder import AutoencoderKL

Row = dict[str, Any]  # image, model and one number per metric


def evaluate(config: EvaluateConfig) -> Path:
    """Measure `config.models` by protocol default-v1, print the table, write JSON and CSV; returns their folder."""
    folder = Path(config.output) / config.name
    images = open_sources(config.data)[1]
    device = find_device(config.device)
    models = {name: model.to(device) for name, model in load_models(config.models).items()}
    channels = _check_sizes(models, config.data.resolution)
    metrics = PairedMetrics(tuple(config.metrics)).to(device)
    measured = [name for name in config.metrics if name not in metrics.missing]
    if not measured:
        raise InputError(f"metrics={config.metrics}: {next(iter(metrics.missing.values()))}")
    _check_writable(folder, config.output)
    batches = validation_loader(images, config.data, channels, rank=0, world_size=1)
    left_out: list[LeftOut] = []
    total = math.ceil(len(images) / config.data.validation_batch_size)
    with _exact_arithmetic():
        shown = track(batches, "Measuring", total, console=Console(stderr=True))
        rows = list(_measure(models, shown, metrics, device, left_out))
    if not rows:
        raise InputError(f"none of {len(images)} images can be read, the first: {left_out[0].reason}")
    summary = {model: _summarise([row for row in rows if row["model"] == model], measured) for model in models}
    counted = len(images) - len(left_out)
    _print(summary, measured, metrics.missing, counted, config.data.resolution)
    excluded = [{"image": one.name, "reason": one.reason} for one in left_out]
    result = {"images": counted, "left_out": excluded, "metrics": summary, "missing": metrics.missing}
    _write(folder, rows, measured, result, config)
    Console().print(f"written  {folder}/metrics.json and {folder}/images.csv", highlight=False, soft_wrap=True)
    if left_out:
        listed = f"{len(left_out)} of {len(images)} images are left out, listed in {folder}/metrics.json; the first: "
        if not config.allow_left_out:
            raise Stopped(BAD_IMAGES, f"{listed}{left_out[0].reason}")
        Console().print(f"{listed}{left_out[0].reason}", highlight=False, markup=False, soft_wrap=True)
    return folder


@torch.no_grad()
def _measure(
    models: dict[str, AutoencoderKL],
    batches: Iterable[Batch],
    metrics: PairedMetrics,
    device: torch.device,
    left_out: list[LeftOut],
) -> Iterator[Row]:
    """Rows of every image; what cannot be read is never replaced, and goes to `left_out`."""
    for batch in batches:
        left_out += batch.left_out
        if not len(batch.images):
            continue
        images = batch.images.to(device)
        for name, model in models.items():
            reconstructions = to_uint8(model.decode(model.encode(to_model_range(images)).mode()))
            columns = metrics(as_depth(images, 8), reconstructions)
            values = {metric: column.tolist() for metric, column in columns.items()}
            for row, image in enumerate(batch.names):
                yield {"image": image, "model": name} | {metric: column[row] for metric, column in values.items()}


def _summarise(rows: list[Row], measured: list[str]) -> dict[str, dict[str, float | int | None]]:
    """Per metric: mean, standard deviation and count of the finite values, and how many were not."""
    summary: dict[str, dict[str, float | int | None]] = {}
    for name in measured:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        finite = values[torch.isfinite(values)]
        summary[name] = {
            "mean": finite.mean().item() if len(finite) else None,
            "std": finite.std().item() if len(finite) > 1 else None,
            "images": len(finite),
            "identical": int(torch.isposinf(values).sum()),
        }
    return summary


def _print(
    summary: dict[str, dict[str, Any]], measured: list[str], missing: dict[str, str], images: int, resolution: int
) -> None:
    console = Console()
    console.print(f"{DEFAULT_V1}\n{images} images at {resolution}x{resolution}\n", highlight=False, soft_wrap=True)
    arrows = {name: "higher" if HIGHER_IS_BETTER[name] else "lower" for name in measured}
    table = Table(Column("model", overflow="fold"), *(f"{name}\n({arrows[name]} is better)" for name in measured))
    for model, by_name in summary.items():
        cells = [by_name[name] for name in measured]
        table.add_row(model, *("-" if cell["mean"] is None else f"{cell['mean']:.4f}" for cell in cells))
    console.print(table)
    for model, by_name in summary.items():
        if by_name.get("psnr", {}).get("identical"):
            console.print(f"{model}: {by_name['psnr']['identical']} identical images left out of the mean PSNR")
    for name, reason in missing.items():
        console.print(f"{name}: not measured. {reason}", highlight=False, soft_wrap=True)


def _write(folder: Path, rows: list[Row], measured: list[str], result: dict[str, Any], config: EvaluateConfig) -> None:
    protocol = {"name": DEFAULT_V1.name, "version": DEFAULT_V1.version, "sha256": DEFAULT_V1.sha256}
    library = {"vae": vae.__version__, "torch": torch.__version__}
    document = {
        "protocol": protocol,
        "resolution": config.data.resolution,
        "models": config.models,
        "library": library,
    } | result
    write_text(folder / "metrics.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    with (
        replacing(folder / "images.csv") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, ["image", "model", *measured])
        writer.writeheader()
        writer.writerows(rows)


def _check_writable(folder: Path, output: str) -> None:
    """Before the measuring, not after it."""
    if (folder / "metrics.json").exists():
        raise InputError(f"name={folder.name!r}: {folder} already holds an evaluation; choose another name")
    try:
        with replacing(folder / "images.csv") as partial:
            partial.touch()
        (folder / "images.csv").unlink()
    except WeightsError as error:
        raise InputError(f"output={output!r}: cannot write there ({error}); choose another folder") from error


def _check_sizes(models: dict[str, AutoencoderKL], resolution: int) -> int:
    """The image channels that all models have."""
    counts = {name: model.config.in_channels for name, model in models.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"models of different channels, {counts}: measure them one by one")
    for name, model in models.items():
        factor = model.config.downsample_factor
        if resolution % factor:
            raise InputError(f"data.resolution={resolution} is not a multiple of {factor}, the factor of {name}")
    return next(iter(counts.values()))


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """No TF32 in matrix products and convolutions; the previous settings come back."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
