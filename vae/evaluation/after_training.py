"""The comparison at the end of a run that began from published weights: is the new model a harmless replacement?

`after_training` runs it when training ends, and `compare_with_init` runs it on request. Both measure the newest export
and its base on the run's validation images and write a report into RUN/evaluations.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig, TrainConfig, with_younger_keys
from vae.distributed import Place, Team, leads_alone
from vae.errors import InputError, Stopped
from vae.evaluation import terminal
from vae.evaluation.compare import DOCUMENT_FILE
from vae.evaluation.drop_in import rescaled
from vae.evaluation.evaluate import PLAN_FILE, evaluate_as
from vae.evaluation.measure import codecs_of, described, load_models
from vae.run_dir import RunDir, step_name
from vae.weights.load import find_export
from vae.weights.loaded import read_json

MEASURED = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "colour_shift", "saturation")
IMAGES = [one.name for one in fields(DataConfig) if one.metadata["chooses_images"]]
PATHS = {"encoder", "decoder"}  # the keys of a model's description that hold paths, which may change
OF_DOOR = ("validation_fraction", "validation_images")  # configs/evaluate and the dataclass have different defaults


def compare_with_init(run: str | Path, base: str | None = None) -> Path:
    """Compare the run's export with the weights that it began from, and return the folder of the report.

    `base` says where these weights are now, if they were moved. The comparison uses the run's validation images at its
    resolution, and covers latents, reconstructions, float16, and pictures before and after.

    The folder is RUN/evaluations/step_N. An evaluation that is already there is not repeated. If it was made against
    another base, or on an export that was rewritten since, the report goes to step_N_2 and so on.

    Raises InputError if the run began from random weights, or if something that the comparison needs is missing.
    """
    run = Path(run).expanduser()
    saved = with_younger_keys(read_json(RunDir(run).config))
    base = base or saved.get("init")
    if base is None:
        raise InputError(f"{run}: it began from chance (init=null); name a base to hold it against")
    try:
        data = DataConfig(**saved["data"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{RunDir(run).config}: data is not what this version of vae writes ({error})") from error
    return _compare(run, base, data, verbose=True)


def after_training(config: TrainConfig, run: Path) -> None:
    """Call `compare_with_init` if `config` asks for it, in the first of the processes that trained.

    The run itself is complete by now. So a failed comparison only prints a line, with the command to repeat it by hand.
    """
    if config.init is None or not config.compare_with_init or not leads_alone():
        return
    try:
        _compare(run, config.init, config.data, verbose=config.verbose)
    except (InputError, Stopped, OSError, RuntimeError) as error:
        terminal.say(f"the run is done, and not held against the weights that it began from: {error}")
        terminal.say(f"by hand: {_command(run, config.init, config.data)}")


def _compare(run: Path, base: str, data: DataConfig, *, verbose: bool) -> Path:
    """Evaluate the export of `run` together with `base` on `data`, unless this was done before."""
    find_export(base, "init")
    folder = _folder_of(run, base)
    if (folder / DOCUMENT_FILE).exists():
        terminal.against_base(json.loads((folder / DOCUMENT_FILE).read_text(encoding="utf-8")), verbose=verbose)
        terminal.say(f"measured before; delete {folder} to measure it again")
        return folder

    # Buckets and cached latents only serve training: images are measured as squares of one size.
    squares = {"bucket_resolutions": [], "bucket_loss": DataConfig.bucket_loss, "latents": None}
    config = EvaluateConfig(
        model=str(run),
        base=base,
        name=folder.name,
        output=str(folder.parent),
        threads=torch.get_num_threads(),
        metrics=list(MEASURED),
        probe_images=0,
        allow_skipped=True,
        verbose=verbose,
        data=replace(data, **squares),
    )
    return evaluate_as(config, Team(Place()))


def _folder_of(run: Path, base: str) -> Path:
    """Return where the run's export is, or will be, compared with `base`: step_N, or step_N_2 and so on."""
    first = RunDir(run).evaluations / _step_of(find_export(run))
    if _begun(first) is None:
        return first

    # What is there may have been measured against another base, or on an export that was rewritten since.
    paths = [base, str(run)]
    models = load_models(paths)
    now = [described(codec, models, dict(zip(models, paths, strict=True))) for codec in codecs_of(models, cross=False)]
    scale = rescaled(*(model.config for model in models.values()))

    folders = (first if number == 1 else first.with_name(f"{first.name}_{number}") for number in count(1))
    return next(folder for folder in folders if (begun := _begun(folder)) is None or _is_of(begun, now, scale))


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return the document in `folder`, or the plan of an interrupted evaluation, or None."""
    found = [folder / file for file in (DOCUMENT_FILE, PLAN_FILE) if (folder / file).exists()]
    return json.loads(found[0].read_text(encoding="utf-8")) if found else None


def _is_of(begun: dict[str, Any], now: Sequence[dict[str, Any]], scale: str | None) -> bool:
    """Tell whether `begun` describes the same models as `now`, wherever their files were then."""
    scales = [verdict["latents"]["rescaled"] for verdict in begun.get("against_base", {}).values()]
    both = zip(begun["models"].values(), now, strict=True)
    are_same = all(then[key] == one[key] for then, one in both for key in then.keys() & one.keys() - PATHS)
    return are_same and all(one == scale for one in scales)


def _step_of(export: Path) -> str:
    """Return the name of the export's step, "step_N". A tiny autoencoder's export may be a file."""
    folder = export.parent if export.name == "diffusers" or export.is_file() else export
    run = RunDir.of_export(folder)
    return step_name(read_json(run.best_record)["updates"]) if run is not None and folder == run.best else folder.name


def _command(run: Path, base: str, data: DataConfig) -> str:
    """Return the shell command that repeats the comparison by hand."""
    values = {name: getattr(data, name) for name in IMAGES}
    chosen = {name: value for name, value in values.items() if name in OF_DOOR or value != getattr(DataConfig, name)}
    given = {"base": base, "model": str(run), "data": data.source} | {f"data.{key}": chosen[key] for key in chosen}
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items())
    return " ".join(["vae evaluate", *map(shlex.quote, words)])
