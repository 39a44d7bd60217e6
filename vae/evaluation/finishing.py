"""When all images are measured: tables, files, the report, and the status."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vae.checkpoints.safe import replacing, write_text
from vae.config import EvaluateConfig
from vae.data.config import DataConfig
from vae.data.loading import HeldOutImages
from vae.data.sources import Source
from vae.data.transforms import to_model_range, to_uint8
from vae.errors import BAD_IMAGES, GATE_FAILED, InputError, Stopped
from vae.evaluation import show
from vae.evaluation.collected import Collected, collect
from vae.evaluation.document import Document, as_csv, of_dataset, rows_of
from vae.evaluation.gates import check
from vae.evaluation.measuring import Bench
from vae.evaluation.recorded import DOCUMENT_FILE, TABLE_FILE
from vae.evaluation.report.drawing import Pictures
from vae.evaluation.report.gallery import choose
from vae.evaluation.report.page import render
from vae.evaluation.robustness import precision, probe
from vae.evaluation.rows import Rows
from vae.evaluation.setting import Setting
from vae.latents import scale_latents

REPORT_FILE = "report.html"


def finish(config: EvaluateConfig, folder: Path, setting: Setting, rows: Rows) -> None:
    """From the rows of all processes to what people look at. `metrics.json` is last: with it the evaluation is done."""
    header, datasets, bench = setting
    models, measured = list(header["models"]), header["measured"]
    collected = collect(rows.read(), list(datasets), models)
    _check_any(collected)
    parts = {name: of_dataset(one, measured, models) for name, one in collected.items()}
    document: Document = header | {"datasets": {name: part.pop("images") for name, part in parts.items()}}
    for name, (_, source) in datasets.items():
        document["datasets"][name]["sha256"] = source.fingerprint()
    for kind in ("metrics", "comparisons", "latents"):
        document[kind] = {name: part[kind] for name, part in parts.items()}
    document |= _probed(config.probe_images, setting, collected)
    table = [row for name, one in collected.items() for row in rows_of(name, one, models)]
    wanted = choose(document, table)
    pictures = {key: _pictures(bench, *datasets[key[0]], key[1]) for key in wanted}
    write_text(folder / REPORT_FILE, render(document, table, pictures))
    with replacing(folder / TABLE_FILE) as partial:
        partial.write_bytes(as_csv(table, measured).encode("utf-8", "surrogateescape"))
    write_text(folder / DOCUMENT_FILE, json.dumps(document, indent=2, allow_nan=False) + "\n")
    rows.forget()
    show.document(document)
    show.written(folder, (REPORT_FILE, DOCUMENT_FILE, TABLE_FILE))
    _end(config, folder, document)


def _end(config: EvaluateConfig, folder: Path, document: Document) -> None:
    failed = check(document, config.gates)
    for failure in failed:
        Console().print(failure, highlight=False, markup=False, soft_wrap=True)
    incomplete = show.incomplete(document, folder / DOCUMENT_FILE)
    if incomplete and not config.allow_left_out:
        raise Stopped(BAD_IMAGES, incomplete)
    if incomplete:
        Console().print(incomplete, highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise Stopped(GATE_FAILED, f"{len(failed)} of the gates failed")


def _check_any(collected: dict[str, Collected]) -> None:
    for name, one in collected.items():
        if not one.lines:
            count, first = len(one.left_out), one.left_out[0]["left_out"]
            raise InputError(f"none of {count} images of {name} can be read, the first: {first}")


def _probed(count: int, setting: Setting, collected: dict[str, Collected]) -> dict[str, Any]:
    """Robustness and precision of each model, on the first images of the first data set."""
    _, datasets, bench = setting
    name, (data, source) = next(iter(datasets.items()))
    indices = [line["index"] for line in collected[name].lines[:count]]
    if not indices:
        return {"robustness": {}, "precision": {}}
    images = [_image(bench, data, source, index) for index in indices]
    with show.probing(len(bench.models), images) as advance:
        robustness = {model: probe(network, images, advance) for model, network in bench.models.items()}
        safety = {model: precision(network, images, advance) for model, network in bench.models.items()}
    return {"robustness": robustness, "precision": safety}


def _image(bench: Bench, data: DataConfig, source: Source, index: int) -> torch.Tensor:
    """(1, C, S, S) in [-1, 1] on the device."""
    channels = next(iter(bench.models.values())).config.in_channels
    sample = HeldOutImages(source, data, channels, bench.protocol.cut)[index]
    assert sample.pixels is not None
    return to_model_range(sample.pixels[None].to(bench.device))


@torch.no_grad()
def _pictures(bench: Bench, data: DataConfig, source: Source, index: int) -> Pictures:
    """What the report shows of an image."""
    image = _image(bench, data, source, index)
    reconstructions, latents = {}, {}
    for codec, made in bench.make(image, [index]):
        reconstructions[codec.name] = to_uint8(made.reconstructions)[0].cpu()
        if not codec.is_crossed:
            latents[codec.name] = scale_latents(made.latents, bench.models[codec.encoder].config)[0].cpu()
    return Pictures(to_uint8(image)[0].cpu(), reconstructions, latents)
