"""Preparation of an evaluation before the first image: networks that fit together, available metrics, and the images.

`prepare` refuses everything that can be refused, so that no evaluation fails after an hour of measuring.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch

from vae import __version__
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig, with_younger_keys
from vae.data.build import open_sources
from vae.data.sources import Files, Source, in_words
from vae.distributed import Team
from vae.errors import InputError
from vae.evaluation.compare import SCHEMA
from vae.evaluation.gates import parse_gates
from vae.evaluation.measure import (
    Evaluator,
    check_scales,
    codecs_of,
    described,
    find_device,
    load_models,
    short_names,
    weights_sha256,
)
from vae.evaluation.protocols import PROTOCOLS
from vae.metrics.paired import PairedMetrics, unavailable
from vae.metrics.registry import CONVENTION_OF, OF_SETS, PAIRED
from vae.models.inception import Inception, load_inception
from vae.models.lpips import MissingBackboneError
from vae.run_dir import RunDir
from vae.weights.load import find_export, which_export
from vae.weights.loaded import read_json

CODE = "code"  # key in the header's "library": the hash of this package


class Setting(NamedTuple):
    """What an evaluation works with; `header` is the part of the document that is known before measuring."""

    header: dict[str, Any]
    datasets: dict[str, tuple[DataConfig, Source]]  # {short name: (its configuration, its images)}
    bench: Evaluator
    lists: dict[str, str]  # {short name: the hash of the list of its images}

    @property
    def roots(self) -> list[str]:
        """The roots of the data sets; those that exist on this machine as absolute paths."""
        given = [Path(str(data.validation_root or data.root)) for data, _ in self.datasets.values()]
        return [str(path.absolute() if path.exists() else path) for path in given]


def prepare(config: EvaluateConfig, team: Team) -> Setting:
    """Open data sets, models and metrics as `config` asks for them.

    Every mistake in `config` that can be found before measuring raises InputError here.
    """
    parse_gates(config.limits)
    datasets = _open(config)
    if config.base is not None:
        find_export(config.base, "base")  # so that the error names the key base

    device = team.device(find_device(config.device))
    models = {name: model.to(device) for name, model in load_models(config.models, config.family).items()}
    if config.cross or config.base is not None:
        check_scales(models)

    channels = _channels(models)
    resolution = config.data.resolution
    _check_resolution(models, resolution)
    codecs = codecs_of(models, cross=config.cross)
    protocol = PROTOCOLS[config.protocol]
    protocol.check(channels, config.data.bits)

    # A metric that cannot be measured is reported as missing, with the reason; a gate on it is an error.
    missing = unavailable(tuple(config.metrics), channels, resolution)
    paired = tuple(name for name in config.metrics if name in PAIRED and name not in missing)
    metrics = PairedMetrics(paired, download=config.download).to(device)
    missing |= {name: f"{reason}; or evaluate with download=true" for name, reason in metrics.missing.items()}
    inception = _inception(config, missing, device)
    _check_measured(config, missing)

    conventions = tuple(sorted({CONVENTION_OF[name] for name in config.metrics if name in OF_SETS}))
    batch_size = config.data.validation_batch_size
    bench = Evaluator(codecs, models, protocol, metrics, inception, device, batch_size, config.seed, conventions)
    lists = {name: list_sha256(source) for name, (_, source) in datasets.items()}
    return Setting(_header(config, bench, missing), datasets, bench, lists)


def _header(config: EvaluateConfig, bench: Evaluator, missing: dict[str, str]) -> dict[str, Any]:
    """Return the part of the document that is known before measuring."""
    batch_size = None if bench.at_once == 1 else bench.batch_size  # recorded where numbers depend on it
    paths = dict(zip(bench.models, config.models, strict=True))
    family = {} if config.family is None else {"family": config.family}

    return family | {
        "schema": SCHEMA,
        "protocol": bench.protocol.described(),
        "resolution": config.data.resolution,
        "seed": config.seed,
        "library": _library(),
        "device": {"type": bench.device.type, "threads": config.threads, "batch_size": batch_size},
        "data": {"bits": config.data.bits, "min_side": config.data.min_side},
        "inception": None if bench.inception is None else weights_sha256(bench.inception),
        "base": None if config.base is None else next(iter(bench.models)),
        "models": {codec.name: described(codec, bench.models, paths) for codec in bench.codecs},
        "measured": [name for name in config.metrics if name not in missing],
        "missing": missing,
    }


def _library() -> dict[str, str]:
    """Return the versions of the code that produces the numbers.

    Pillow decodes and resizes. The version of torchvision follows from that of torch.
    """
    ours = {"vae": __version__, CODE: code_sha256()}
    return ours | {"torch": torch.__version__, "pillow": PIL.__version__}


def code_sha256(package: Path = Path(__file__).parents[1]) -> str:
    """Hash the names and the text of all Python files of the package.

    The version alone does not tell: two checkouts of one version can differ, and files can be edited.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def _check_measured(config: EvaluateConfig, missing: dict[str, str]) -> None:
    """Raise InputError if a metric with a gate cannot be measured, or if no metric can."""
    for name in (name for name in config.limits if name in missing):
        raise InputError(f"gates.{name}={config.limits[name]}: {name} cannot be measured: {missing[name]}")
    if len(missing) == len(config.metrics):
        raise InputError(f"metrics={config.metrics}: {next(iter(missing.values()))}")


def _open(config: EvaluateConfig) -> dict[str, tuple[DataConfig, Source]]:
    """Open the data sets as {short name: (its configuration, its images)}."""
    data = config.data
    given = config.datasets or [data.validation_root or data.root or data.source]
    names = short_names(given, "datasets")
    each = [replace(data, root=root) for root in config.datasets] or [data]
    return {name: (data, open_sources(data)[1]) for name, data in zip(names, each, strict=True)}


def notes_on(config: EvaluateConfig, setting: Setting) -> list[str]:
    """Return what somebody who will show the numbers must know before they are measured."""
    notes = [which_export(path) for path in config.models]
    resolution = config.data.resolution
    for name, model in setting.bench.models.items():
        size = model.config.sample_size
        if size < resolution:
            notes.append(f"{name} is made for {size} px and measured at data.resolution={resolution}")
        if not model.config.scale_is_known:
            notes.append(f"{name} does not tell its scaling factor; pictures of its latents take one, family= says it")

    for data, source in setting.datasets.values():
        if isinstance(source, Files):
            notes.append(in_words(source.passed_over, source.root))
        notes += [_seen(path, data, source) for path in dict.fromkeys(config.models)]
    return [note for note in notes if note]


def _seen(path: str, data: DataConfig, source: Source) -> str:
    """Say how many images of `source` the model at `path` was trained on, "" where its run tells of none."""
    run = RunDir.owning(path)
    seen = 0 if run is None else trained_on(run, data, source)
    if run is None or seen == 0:
        return ""

    saved = with_younger_keys(read_json(run.config))["data"]
    held_out = f"data.validation_fraction={saved['validation_fraction']}"
    held_out = f"data.root={saved['validation_root']}" if saved["validation_root"] else held_out
    told = f"{seen:,} of these {len(source):,} images were trained on by {run.path}: numbers of new images may be worse"
    return f"{told}; {held_out} measures those that were held out"


def trained_on(run: RunDir, data: DataConfig, source: Source) -> int:
    """Return how many images of `source`, which `data` describes, were among the training images of `run`.

    Files are compared by their whole paths, other images by their names in the same data set.
    """
    try:
        saved = DataConfig(**with_younger_keys(read_json(run.config))["data"])
        is_same = (saved.source, saved.root, saved.split) == (data.source, data.root, data.split)
        if not is_same and not (isinstance(source, Files) and _may_share(saved, data)):
            return 0
        training = open_sources(saved)[0]
    except (InputError, KeyError, TypeError):  # moved since, or of another version
        return 0

    if isinstance(training, Files) and isinstance(source, Files):
        return int(np.isin(source.path_hashes(), training.path_hashes()).sum())
    return len(set(training.names) & set(source.names))


def _may_share(one: DataConfig, other: DataConfig) -> bool:
    """Return whether two data sets of files may have files in common: one lies in the other's folder."""
    if not {one.source, other.source} <= {"folder", "list"} or one.root is None or other.root is None:
        return False
    places = [Path(data.root or "").expanduser().resolve() for data in (one, other)]
    first, second = (place.parent if place.is_file() else place for place in places)
    return first == second or first in second.parents or second in first.parents


def list_sha256(source: Source) -> str:
    """Hash the names of all images, and the sizes of their files if they are files."""
    digest = hashlib.sha256(source.fingerprint().encode())
    if isinstance(source, Files):
        for path in (source.root / name for name in source.names):
            digest.update(f"{path.stat().st_size if path.is_file() else 0}\0".encode())
    return digest.hexdigest()


def _inception(config: EvaluateConfig, missing: dict[str, str], device: torch.device) -> Inception | None:
    """Load Inception if a metric needs it; None if it is not needed or not available.

    If it is not available, its metrics are added to `missing`. Raises MissingBackboneError if `config.inception` names
    a file that cannot be used.
    """
    wanted = [name for name in config.metrics if name in OF_SETS and name not in missing]
    if not wanted:
        return None
    try:
        return load_inception(config.inception, download=config.download).to(device)
    except MissingBackboneError as error:
        if config.inception is not None:
            raise
        missing |= dict.fromkeys(wanted, f"{error}, with inception=PATH; or evaluate with download=true")
        return None


def _channels(models: dict[str, Any]) -> int:
    """Return the number of image channels, which must be the same for all models; raises InputError otherwise."""
    counts = {name: model.config.in_channels for name, model in models.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"model={list(counts)}: models of different channels, {counts}; measure them one by one")
    return next(iter(counts.values()))


def _check_resolution(models: dict[str, Any], resolution: int) -> None:
    """Raise InputError unless the resolution is a multiple of every model's downsampling factor."""
    for name, model in models.items():
        factor = model.config.downsample_factor
        if resolution % factor:
            wrong = f"data.resolution={resolution} is not a multiple of {factor}, the factor of {name}"
            raise InputError(f"{wrong}; choose e.g. {max(1, round(resolution / factor)) * factor}")
