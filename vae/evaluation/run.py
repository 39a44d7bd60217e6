"""`evaluate`: one or several autoencoders on one or several sets of images, image by image."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vae.checkpoints.lock import locked
from vae.checkpoints.metadata import read_json
from vae.checkpoints.safe import write_text
from vae.config import EvaluateConfig
from vae.data.loading import Batch, HeldOutImages, indexed_loader, shut_down
from vae.data.sources import Source
from vae.errors import INTERRUPTED, InputError, Stopped
from vae.evaluation.finishing import finish
from vae.evaluation.measuring import exact_arithmetic
from vae.evaluation.recorded import DOCUMENT_FILE
from vae.evaluation.rows import Rows
from vae.evaluation.setting import CODE, Setting, prepare
from vae.evaluation.show import say
from vae.evaluation.team import Team, first_difference, gathered

PLAN_FILE = "plan.json"


def evaluate(config: EvaluateConfig) -> Path:
    """Measure `config.models`, print tables, write JSON, CSV and the report; returns their folder.

    The processes of torchrun share the images. What is measured is kept as it comes: the same call goes on where an
    earlier one was interrupted. Raises `Stopped` where images are left out or not finite, and where a gate fails.
    """
    with gathered() as team:
        return evaluate_as(config, team)


def evaluate_as(config: EvaluateConfig, team: Team) -> Path:
    """`evaluate` by this process of `team`."""
    with ExitStack() as held, exact_arithmetic(config.threads):
        folder = Path(config.output) / team.of_first(config.name)
        setting = prepare(config, team)
        plan = setting.header | {"images": setting.lists, "roots": setting.roots}
        team.agree(plan)
        refusal = team.of_first(_begin(folder, plan, held) if team.leads else "")
        if refusal:
            raise InputError(refusal)
        if team.leads:
            say(f"measuring into {folder}; interrupted, the same command with name={folder.name} goes on")
            resolution = config.data.resolution
            sizes = {name: model.config.sample_size for name, model in setting.bench.models.items()}
            for name in (name for name, size in sizes.items() if size < resolution):
                say(f"note: {name} is made for {sizes[name]} px and measured at data.resolution={resolution}")
            for name in (name for name, model in setting.bench.models.items() if not model.config.scale_is_known):
                say(f"note: {name} does not tell its scaling factor; pictures of its latents take one, family= says it")
        rows = Rows(folder, team.rank)
        try:
            _measure(setting, rows, team)
            if team.leads:
                finish(config, folder, setting, rows)
        except KeyboardInterrupt:
            raise Stopped(INTERRUPTED, f"interrupted; the same command with name={folder.name} goes on") from None
    return folder


def _measure(setting: Setting, rows: Rows, team: Team) -> None:
    """This process's share of what is not yet known."""
    bench, datasets = setting.bench, setting.datasets
    known = rows.known()
    team.wait()  # nobody writes before everybody has read
    rows.begin()
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
    return [index for index in range(len(source)) if (name, index) not in known]


def _begin(folder: Path, plan: dict[str, Any], held: ExitStack) -> str:
    """Take the folder and say in it what is measured; else say why not."""
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
    """Why an evaluation that was begun by the plan `before` cannot go on by this one."""
    if CODE not in before.get("library", {}):
        untold = "which did not note its code and the models' configurations: it cannot go on"
        return f"what an earlier version of vae began to measure, {untold}"
    other = first_difference(before, plan)
    return None if other is None else f"an interrupted evaluation with other {other}"
