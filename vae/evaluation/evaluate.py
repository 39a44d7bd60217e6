"""Evaluation of one or several autoencoders on one or several sets of images, image by image.

`evaluate` shares the images among the processes of torchrun, and each process writes rows as they are measured. When
all images have rows, the first process makes tables, files and the report from them (`finish`), and decides about the
exit status.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.console import progress, say
from vae.data.loader import Batch, HeldOutImages, indexed_loader, shut_down
from vae.data.sources import Source
from vae.data.transforms import to_model_range, to_uint8
from vae.distributed import Team, first_difference, gathered
from vae.errors import BAD_IMAGES, GATE_FAILED, INTERRUPTED, InputError, Stopped
from vae.evaluation import terminal
from vae.evaluation.compare import DOCUMENT_FILE, TABLE_FILE
from vae.evaluation.drop_in import SEEN, judge, latents_against_base
from vae.evaluation.gates import check, parse_gates
from vae.evaluation.measure import Evaluator, exact_arithmetic
from vae.evaluation.report.gallery import choose
from vae.evaluation.report.images import Pictures, grid
from vae.evaluation.report.page import render
from vae.evaluation.results import (
    SKIPPED,
    Collected,
    Document,
    Row,
    Rows,
    as_csv,
    as_markdown,
    collect,
    of_dataset,
    rows_of,
)
from vae.evaluation.robustness import precision, probe, probe_steps
from vae.evaluation.setup import CODE, Setting, notes_on, prepare
from vae.files import locked, replacing, write_text
from vae.latents import scale_latents
from vae.precision.audit import audit_steps
from vae.weights.loaded import read_json

REPORT_FILE = "report.html"
BEFORE_AFTER_FILE = "before_after.png"
MARKDOWN_FILE = "table.md"
PICTURES, PICTURES_A_MODEL = 14, 10  # images in the report: typical ones, and the extremes for each model


def finish(config: EvaluateConfig, folder: Path, setting: Setting, rows: Rows) -> None:
    """Turn the rows of all processes into the report, the tables and the text on the terminal.

    `metrics.json` is written last: an evaluation is complete once it exists. Raises InputError if rows are missing, and
    `Stopped` if images were skipped, reconstructions are not finite, or a gate failed.
    """
    models = list(setting.header["models"])
    collected = collect(rows.read(), list(setting.datasets), models)
    _check_all(collected, setting.datasets)

    document = _measured(setting, collected)
    _judge(document, config, setting, collected)

    table = [row for name, one in collected.items() for row in rows_of(name, one, models)]
    drawn = _draw(document, table, setting, folder)
    _write(document, table, folder)

    # The document is complete on disk, so the rows that a rerun would need can go.
    rows.forget()
    terminal.document(document, verbose=config.verbose)
    terminal.written(folder, (*drawn, MARKDOWN_FILE, DOCUMENT_FILE, TABLE_FILE))
    _end(config, folder, document)


def _measured(setting: Setting, collected: dict[str, Collected]) -> Document:
    """Return the document with everything that follows from the rows alone."""
    parts = {name: of_dataset(one, setting.header) for name, one in collected.items()}
    document: Document = setting.header | {"datasets": {name: part.pop("images") for name, part in parts.items()}}
    for name, sha256 in setting.lists.items():
        document["datasets"][name]["sha256"] = sha256
    for kind in ("metrics", "comparisons", "latents"):
        document[kind] = {name: part[kind] for name, part in parts.items()}
    return document


def _judge(document: Document, config: EvaluateConfig, setting: Setting, collected: dict[str, Collected]) -> None:
    """Add to the document what needs the models again, on a few images, and the verdicts."""
    probed, latents = _probed(config, setting, collected)
    document |= probed
    document["against_base"] = {model: judge(document, model, one) for model, one in latents.items()}
    document["gates"] = {"asked": parse_gates(config.limits), "failed": check(document, config.limits)}


def _draw(document: Document, table: list[Row], setting: Setting, folder: Path) -> tuple[str, ...]:
    """Write the report and the sheet of images before and after; return the names of the files.

    The report can only show some images: the most telling ones are decoded again for it.
    """
    wanted = choose(document, table, PICTURES + PICTURES_A_MODEL * len(setting.bench.models))
    found = {key: _pictures(setting.bench, *setting.datasets[key[0]], key[1]) for key in wanted}
    pictures = {key: one for key, one in found.items() if one is not None}

    sheet = grid(document, pictures)
    write_text(folder / REPORT_FILE, render(document, table, pictures, sheet))
    if sheet is None:
        return (REPORT_FILE,)
    with replacing(folder / BEFORE_AFTER_FILE) as partial:
        sheet.save(partial, "PNG")
    return REPORT_FILE, BEFORE_AFTER_FILE


def _write(document: Document, table: list[Row], folder: Path) -> None:
    """Write the tables and, last, the document."""
    # Names of files may hold bytes that are not UTF-8: they are written as they are.
    with replacing(folder / TABLE_FILE) as partial:
        partial.write_bytes(as_csv(table, document).encode("utf-8", "surrogateescape"))
    write_text(folder / MARKDOWN_FILE, as_markdown(document))
    write_text(folder / DOCUMENT_FILE, json.dumps(document, indent=2, allow_nan=False) + "\n")


def _end(config: EvaluateConfig, folder: Path, document: Document) -> None:
    """Print the outcome of the gates; raises `Stopped` if images are missing from the numbers or a gate failed."""
    asked, failed = document["gates"]["asked"], document["gates"]["failed"]
    for failure in failed:
        say(failure)
    if asked and not failed:
        limits = ", ".join(f"{name} {limit:g}" for name, limit in asked.items())
        say(f"all gates are passed: {limits}")

    # Missing images stop the run before failed gates do: the gates saw incomplete numbers.
    incomplete = terminal.incomplete(document, folder / DOCUMENT_FILE)
    if incomplete and not config.allow_skipped:
        raise Stopped(BAD_IMAGES, f"{incomplete}. allow_skipped=true accepts that")
    if incomplete:
        say(incomplete)
    if failed:
        raise Stopped(GATE_FAILED, f"{len(failed)} of {terminal.gates_in(document)} gates failed")


def _check_all(collected: dict[str, Collected], datasets: dict[str, tuple[DataConfig, Source]]) -> None:
    """Raise InputError unless every image has a row and at least one image has numbers."""
    for name, (_, source) in datasets.items():
        known = len(collected[name].lines) + len(collected[name].skipped)
        if known != len(source):
            wrong = f"{known} of {len(source)} images of {name} have rows"
            raise InputError(f"{wrong}: output= must be one folder that all processes share; run the command again")
    if not any(one.lines for one in collected.values()):
        name, one = next(iter(collected.items()))
        count = len(one.skipped)
        first = one.skipped[0][SKIPPED]
        raise InputError(f"none of {count} images of {name} can be read, the first: {first}")


def _probed(
    config: EvaluateConfig, setting: Setting, collected: dict[str, Collected]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure robustness and precision of each model, and the drift of its latents from the base's.

    The images are the first of the first data set. Where there is a base, precision and latents are measured whatever
    `probe_images` is. Returns the two parts of the document, and the drift of the latents by model.
    """
    bench = setting.bench
    count = config.probe_images
    images = _first(setting, collected, count if config.base is None else max(count, SEEN))
    probed = images[:count]
    audited = images[: count or 1]
    if not images:
        return {"robustness": {}, "precision": {}}, {}

    models = bench.models.items()
    with progress("Probing", len(models) * (probe_steps(probed) + audit_steps(audited))) as advance:
        robustness = {model: probe(network, probed, advance) for model, network in models if probed}
        safety = {model: precision(network, audited, advance) for model, network in models}

    latents: dict[str, dict[str, Any]] = {}
    if config.base is not None:
        latents = latents_against_base(bench.models, images[:SEEN])
    return {"robustness": robustness, "precision": safety}, latents


def _first(setting: Setting, collected: dict[str, Collected], count: int) -> list[torch.Tensor]:
    """Return the first `count` images of the first data set that has any, without those that are no longer readable."""
    name = next(name for name, one in collected.items() if one.lines)
    indices = [line["index"] for line in collected[name].lines[:count]]
    read = (_image(setting.bench, *setting.datasets[name], index) for index in indices)
    return [image for image in read if image is not None]


def _image(bench: Evaluator, data: DataConfig, source: Source, index: int) -> torch.Tensor | None:
    """Read an image as (1, C, S, S) in [-1, 1] on the device; None if it disappeared since it was measured."""
    channels = next(iter(bench.models.values())).config.in_channels
    pixels = HeldOutImages(source, data, channels, bench.protocol.cut)[index].pixels
    return None if pixels is None else to_model_range(pixels[None].to(bench.device))


@torch.no_grad()
def _pictures(bench: Evaluator, data: DataConfig, source: Source, index: int) -> Pictures | None:
    """Make what the report shows of an image: the reconstructions and latents of all models."""
    image = _image(bench, data, source, index)
    if image is None:
        return None

    reconstructions, latents = {}, {}
    for codec, made in bench.make(image, [index]):
        reconstructions[codec.name] = to_uint8(made.reconstructions)[0].cpu()
        if not codec.is_crossed:
            scale = bench.models[codec.encoder].config.taking_its_scale()  # an assumed scale is enough for a picture
            latents[codec.name] = scale_latents(made.latents, scale)[0].cpu()
    return Pictures(to_uint8(image)[0].cpu(), reconstructions, latents)


PLAN_FILE = "plan.json"


def evaluate(config: EvaluateConfig) -> Path:
    """Measure `config.models`, print tables, write JSON, CSV and the report, and return the folder of these files.

    The processes of torchrun share the images. Measurements are stored as they are made, so the same call continues an
    evaluation that was interrupted. Raises `Stopped` if images are skipped or reconstructions are not finite, and if a
    gate fails.
    """
    with gathered() as team:
        return evaluate_as(config, team)


def evaluate_as(config: EvaluateConfig, team: Team) -> Path:
    """Do the part of `evaluate` that falls to this process of `team`."""
    with ExitStack() as held, exact_arithmetic(config.threads):
        folder = Path(config.output) / team.of_first(config.name)
        setting = prepare(config, team)

        # Only one process may take the folder, and all of them have to stop if it cannot.
        plan = setting.header | {"images": setting.lists, "roots": setting.roots}
        team.agree(plan)
        refusal = team.of_first(_begin(folder, plan, held) if team.leads else "")
        if refusal:
            raise InputError(refusal)
        if team.leads:
            say(f"measuring into {folder}; interrupted, the same command with name={folder.name} goes on")
            for note in notes_on(config, setting):
                say(f"note: {note}")

        rows = Rows(folder, team.rank)
        try:
            _measure(setting, rows, team)
            if team.leads:
                finish(config, folder, setting, rows)
        except KeyboardInterrupt:
            raise Stopped(INTERRUPTED, f"interrupted; the same command with name={folder.name} goes on") from None
    return folder


def _measure(setting: Setting, rows: Rows, team: Team) -> None:
    """Measure this process's share of the images that have no row yet."""
    bench, datasets = setting.bench, setting.datasets
    known = rows.known()
    team.wait()  # no process may write before all have read
    rows.begin()

    # Every process takes each n-th of the missing images, of each data set by itself.
    images = {name: _missing(name, source, known)[team.rank :: team.world] for name, (_, source) in datasets.items()}
    total = sum(math.ceil(len(part) / datasets[name][0].validation_batch_size) for name, part in images.items())

    batches = _batches(setting, images)
    shown = track(batches, "Measuring", total, console=Console(stderr=True)) if team.leads else batches
    try:
        for name, batch in shown:
            for line in bench.measure(name, batch):
                rows.add(line)
    except torch.OutOfMemoryError as error:
        size = f"data.validation_batch_size={bench.batch_size}"
        raise InputError(f"{size}: the GPU has no memory left for it; lower it") from error
    rows.end()
    team.wait()


def _batches(setting: Setting, images: dict[str, list[int]]) -> Iterator[tuple[str, Batch]]:
    """Yield (data set, batch) for the images of each data set that `images` lists by index."""
    bench = setting.bench
    channels = next(iter(bench.models.values())).config.in_channels
    for name, indices in images.items():
        data, source = setting.datasets[name]
        loader = indexed_loader(HeldOutImages(source, data, channels, bench.protocol.cut), indices)
        try:
            for batch in loader:
                yield name, batch
        finally:
            shut_down(loader)


def _missing(name: str, source: Source, known: set[tuple[str, int]]) -> list[int]:
    """Return the indices of the images that have no row yet."""
    return [index for index in range(len(source)) if (name, index) not in known]


def _begin(folder: Path, plan: dict[str, Any], held: ExitStack) -> str:
    """Lock the folder and write the plan of the evaluation into it; returns why this cannot be done, or ""."""
    try:
        held.enter_context(locked(folder, "measuring"))
        if (folder / DOCUMENT_FILE).exists():
            return f"name={folder.name!r}: {folder} already holds an evaluation; choose another name"
        if (folder / PLAN_FILE).exists():
            unlike = _unlike(read_json(folder / PLAN_FILE), plan)
        else:
            unlike = f"rows and no {PLAN_FILE} that says of what" if Rows(folder, 0).are_there() else None
        if unlike is not None:
            return f"name={folder.name!r}: {folder} holds {unlike}; choose another name, or delete it"

        write_text(folder / PLAN_FILE, json.dumps(plan, indent=2))
    except InputError as error:
        return str(error)
    return ""


def _unlike(before: dict[str, Any], plan: dict[str, Any]) -> str | None:
    """Say why an evaluation begun under the plan `before` cannot continue under this one; None if it can."""
    if CODE not in before.get("library", {}):
        untold = "which did not note its code and the models' configurations: it cannot go on"
        return f"what an earlier version of vae began to measure, {untold}"
    other = first_difference(before, plan)
    return None if other is None else f"an interrupted evaluation with other {other}"
