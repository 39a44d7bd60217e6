"""When all images are measured: tables, files, the report, and the status."""

import json
from pathlib import Path
from typing import Any

import torch

from vae.audit.precision import audit_steps
from vae.checkpoints.safe import replacing, write_text
from vae.config import EvaluateConfig
from vae.data.config import DataConfig
from vae.data.loading import HeldOutImages
from vae.data.sources import Source
from vae.data.transforms import to_model_range, to_uint8
from vae.errors import BAD_IMAGES, GATE_FAILED, InputError, Stopped
from vae.evaluation import show
from vae.evaluation.base import SEEN, judge, latents_against_base
from vae.evaluation.collected import Collected, collect
from vae.evaluation.document import Document, as_csv, of_dataset, rows_of
from vae.evaluation.gates import check, parse_gates
from vae.evaluation.measuring import Bench
from vae.evaluation.recorded import DOCUMENT_FILE, TABLE_FILE
from vae.evaluation.report.before_after import grid
from vae.evaluation.report.drawing import Pictures
from vae.evaluation.report.gallery import choose
from vae.evaluation.report.page import render
from vae.evaluation.robustness import precision, probe, probe_steps
from vae.evaluation.rows import Rows
from vae.evaluation.setting import Setting
from vae.latents import scale_latents

REPORT_FILE, BEFORE_AFTER_FILE = "report.html", "before_after.png"
PICTURES, PICTURES_A_MODEL = 14, 10  # in the report: typical ones, and the ends of each metric of each model


def finish(config: EvaluateConfig, folder: Path, setting: Setting, rows: Rows) -> None:
    """From the rows of all processes to what people look at. `metrics.json` is last: with it the evaluation is done."""
    header, datasets, bench, lists = setting
    models = list(header["models"])
    collected = collect(rows.read(), list(datasets), models)
    _check_all(collected, datasets)
    parts = {name: of_dataset(one, header) for name, one in collected.items()}
    document: Document = header | {"datasets": {name: part.pop("images") for name, part in parts.items()}}
    for name, sha256 in lists.items():
        document["datasets"][name]["sha256"] = sha256
    for kind in ("metrics", "comparisons", "latents"):
        document[kind] = {name: part[kind] for name, part in parts.items()}
    probed, latents = _probed(config, setting, collected)
    document |= probed
    document["against_base"] = {model: judge(document, model, one) for model, one in latents.items()}
    document["gates"] = {"asked": parse_gates(config.limits), "failed": check(document, config.limits)}
    table = [row for name, one in collected.items() for row in rows_of(name, one, models)]
    wanted = choose(document, table, PICTURES + PICTURES_A_MODEL * len(bench.models))
    found = {key: _pictures(bench, *datasets[key[0]], key[1]) for key in wanted}
    pictures = {key: one for key, one in found.items() if one is not None}
    write_text(folder / REPORT_FILE, render(document, table, pictures))
    before_after = grid(document, pictures)
    if before_after is not None:
        with replacing(folder / BEFORE_AFTER_FILE) as partial:
            before_after.save(partial, "PNG")
    with replacing(folder / TABLE_FILE) as partial:
        partial.write_bytes(as_csv(table, header).encode("utf-8", "surrogateescape"))
    write_text(folder / DOCUMENT_FILE, json.dumps(document, indent=2, allow_nan=False) + "\n")
    rows.forget()
    show.document(document)
    drawn = () if before_after is None else (BEFORE_AFTER_FILE,)
    show.written(folder, (REPORT_FILE, *drawn, DOCUMENT_FILE, TABLE_FILE))
    _end(config, folder, document)


def _end(config: EvaluateConfig, folder: Path, document: Document) -> None:
    asked, failed = document["gates"]["asked"], document["gates"]["failed"]
    for failure in failed:
        show.say(failure)
    if asked and not failed:
        limits = ", ".join(f"{name} {limit:g}" for name, limit in asked.items())
        show.say(f"all gates are passed: {limits}")
    incomplete = show.incomplete(document, folder / DOCUMENT_FILE)
    if incomplete and not config.allow_left_out:
        raise Stopped(BAD_IMAGES, f"{incomplete}. allow_left_out=true accepts that")
    if incomplete:
        show.say(incomplete)
    if failed:
        raise Stopped(GATE_FAILED, f"{len(failed)} of {show.gates_in(document)} gates failed")


def _check_all(collected: dict[str, Collected], datasets: dict[str, tuple[DataConfig, Source]]) -> None:
    """Every image has a row, and some image has numbers."""
    for name, (_, source) in datasets.items():
        known = len(collected[name].lines) + len(collected[name].left_out)
        if known != len(source):
            wrong = f"{known} of {len(source)} images of {name} have rows"
            raise InputError(f"{wrong}: output= must be one folder that all processes share; run the command again")
    if not any(one.lines for one in collected.values()):
        name, one = next(iter(collected.items()))
        count, first = len(one.left_out), one.left_out[0]["left_out"]
        raise InputError(f"none of {count} images of {name} can be read, the first: {first}")


def _probed(
    config: EvaluateConfig, setting: Setting, collected: dict[str, Collected]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Robustness and precision of each model, and latents against the base, on the first images of the first data set.

    With a base precision and latents are looked at whatever `probe_images` is.
    """
    bench, count = setting.bench, config.probe_images
    images = _first(setting, collected, count if config.base is None else max(count, SEEN))
    probed, audited = images[:count], images[: count or 1]
    if not images:
        return {"robustness": {}, "precision": {}}, {}
    models = bench.models.items()
    with show.probing(len(models) * (probe_steps(probed) + audit_steps(audited))) as advance:
        robustness = {model: probe(network, probed, advance) for model, network in models if probed}
        safety = {model: precision(network, audited, advance) for model, network in models}
    latents: dict[str, dict[str, Any]] = {}
    if config.base is not None:
        latents = latents_against_base(bench.models, images[:SEEN])
    return {"robustness": robustness, "precision": safety}, latents


def _first(setting: Setting, collected: dict[str, Collected], count: int) -> list[torch.Tensor]:
    """The first `count` images of the first data set that has any; those that can still be read."""
    name = next(name for name, one in collected.items() if one.lines)
    indices = [line["index"] for line in collected[name].lines[:count]]
    read = (_image(setting.bench, *setting.datasets[name], index) for index in indices)
    return [image for image in read if image is not None]


def _image(bench: Bench, data: DataConfig, source: Source, index: int) -> torch.Tensor | None:
    """(1, C, S, S) in [-1, 1] on the device; none where it has gone since it was measured."""
    channels = next(iter(bench.models.values())).config.in_channels
    pixels = HeldOutImages(source, data, channels, bench.protocol.cut)[index].pixels
    return None if pixels is None else to_model_range(pixels[None].to(bench.device))


@torch.no_grad()
def _pictures(bench: Bench, data: DataConfig, source: Source, index: int) -> Pictures | None:
    """What the report shows of an image."""
    image = _image(bench, data, source, index)
    if image is None:
        return None
    reconstructions, latents = {}, {}
    for codec, made in bench.make(image, [index]):
        reconstructions[codec.name] = to_uint8(made.reconstructions)[0].cpu()
        if not codec.is_crossed:
            scale = bench.models[codec.encoder].config.taking_its_scale()  # assumed will do for a look, and is said
            latents[codec.name] = scale_latents(made.latents, scale)[0].cpu()
    return Pictures(to_uint8(image)[0].cpu(), reconstructions, latents)
