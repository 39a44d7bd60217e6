"""`evaluate`: one or several autoencoders on one or several sets of images, image by image."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vae.checkpoints.lock import locked
from vae.checkpoints.safe import write_text
from vae.config import EvaluateConfig
from vae.data.config import DataConfig
from vae.data.loading import Batch, HeldOutImages, indexed_loader
from vae.data.sources import Source
from vae.errors import InputError
from vae.evaluation.finishing import finish
from vae.evaluation.measuring import Bench, exact_arithmetic
from vae.evaluation.recorded import DOCUMENT_FILE
from vae.evaluation.rows import Rows
from vae.evaluation.setting import Setting, prepare
from vae.evaluation.team import Team, gathered

PLAN_FILE = "plan.json"


def evaluate(config: EvaluateConfig) -> Path:
    """Measure `config.models`, print tables, write JSON, CSV and the report; returns their folder.

    The processes of torchrun share the images. What is measured is kept as it comes: the same call goes on where an
    earlier one was interrupted. Raises `Stopped` where images are left out or not finite, and where a gate fails.
    """
    with gathered() as team, ExitStack() as held, exact_arithmetic(config.threads):
        folder = Path(config.output) / team.of_first(config.name)
        setting = prepare(config, team)
        prints = {name: source.fingerprint() for name, (_, source) in setting.datasets.items()}
        decisive = _decisive(config.data, setting.bench)
        plan = json.dumps({"header": setting.header, "images": prints, "data": decisive}, indent=2)
        team.agree(plan, "models or images")
        refusal = team.of_first(_begin(folder, plan, held) if team.leads else "")
        if refusal:
            raise InputError(refusal)
        rows = Rows(folder, team.rank)
        _measure(setting, rows, team)
        if team.leads:
            finish(config, folder, setting, rows)
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
    for name, batch in shown:
        for line in bench.measure(name, batch):
            rows.add(line)
    rows.end()
    team.wait()


def _batches(setting: Setting, images: dict[str, list[int]]) -> Iterator[tuple[str, Batch]]:
    bench = setting.bench
    channels = next(iter(bench.models.values())).config.in_channels
    for name, indices in images.items():
        data, source = setting.datasets[name]
        for batch in indexed_loader(HeldOutImages(source, data, channels, bench.protocol.cut), indices):
            yield name, batch


def _missing(name: str, source: Source, known: set[tuple[str, int]]) -> list[int]:
    return [index for index in range(len(source)) if (name, index) not in known]


def _decisive(data: DataConfig, bench: Bench) -> dict[str, Any]:
    """What else numbers depend on."""
    batch = None if bench.at_once == 1 else data.validation_batch_size
    return {"bits": data.bits, "min_side": data.min_side, "batch_size": batch}


def _begin(folder: Path, plan: str, held: ExitStack) -> str:
    """Take the folder and say in it what is measured; else say why not."""
    try:
        held.enter_context(locked(folder, "measuring"))
        if (folder / DOCUMENT_FILE).exists():
            return f"name={folder.name!r}: {folder} already holds an evaluation; choose another name"
        if (folder / PLAN_FILE).exists() and (folder / PLAN_FILE).read_text(encoding="utf-8") != plan:
            unlike = "an interrupted evaluation of other models, images or settings"
            return f"name={folder.name!r}: {folder} holds {unlike}; choose another name, or delete it"
        write_text(folder / PLAN_FILE, plan)
    except InputError as error:
        return str(error)
    return ""
