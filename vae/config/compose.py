"""The Hydra door: from YAML groups and overrides to a typed configuration, or to one line that says what is wrong.

Below it there is no DictConfig. `HYDRA_FULL_ERROR=1` shows tracebacks.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae.config.schema import CONFIG_FILE, TrainConfig
from vae.errors import BAD_INPUT, InputError, Stopped

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRACEBACKS = "HYDRA_FULL_ERROR"
PATHS = ("data.root", "data.validation_root")
Config = TypeVar("Config")


def run(folder: str, name: str, schema: type[Config], action: Callable[[Config], object]) -> None:
    """Compose `configs/{folder}/{name}.yaml` with the command line's overrides into `schema`, then `action(config)`.

    Input that is refused, and a run that stops early, end the process with their status and one line on stderr.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    wants_traceback = os.environ.get(TRACEBACKS) == "1"

    @hydra.main(version_base="1.3", config_path=str(CONFIGS / folder), config_name=name)
    def command(cfg: Any) -> None:
        try:
            action(cast(Config, OmegaConf.to_object(_as_the_run_has_it(cfg, schema))))
        except (InputError, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            _end(_sentence(error), BAD_INPUT)
        except Stopped as stop:
            _end(stop.message, stop.code)

    sys.argv[1:] = [_with_quotes(argument) for argument in sys.argv[1:]]
    try:
        with _raising_hydra():
            command()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        _end(_sentence(error), BAD_INPUT)


def _with_quotes(argument: str) -> str:
    """Hydra reads braces and commas as its own; the shell has taken the quotes from around a pattern or a path."""
    key, _, value = argument.partition("=")
    is_plain = key not in PATHS or not value or value[0] in "'\"" or "${" in value or value == "null"
    return argument if is_plain else "{}='{}'".format(key, value.replace("'", "\\'"))


def compose(*overrides: str) -> TrainConfig:
    """The configuration that `python train.py OVERRIDES` would train: compose("model=tiny", "updates=100").

    Raises InputError with the line that the command would print.
    """
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return cast(TrainConfig, OmegaConf.to_object(hydra.compose("train", list(map(_with_quotes, overrides)))))
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise InputError(_sentence(error)) from error


def _as_the_run_has_it(cfg: Any, schema: type) -> Any:
    """With `resume=DIRECTORY` the run's own configuration, and the values on the command line on top.

    Where the command line chooses groups it is the whole configuration again, to be compared with the run's.
    """
    resume = OmegaConf.select(cfg, "resume", default=None)
    file = Path(str(resume)).expanduser() / CONFIG_FILE
    keys = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    if resume is None or not file.is_file() or set(keys) & set(HydraConfig.get().runtime.choices):
        return cfg
    try:
        saved = OmegaConf.merge(OmegaConf.structured(schema), json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{file}: not readable as a run's configuration; restore it or start a new run") from error
    for key in keys:
        OmegaConf.update(saved, key, OmegaConf.select(cfg, key), force_add=True)
    return saved


@contextmanager
def _raising_hydra() -> Iterator[None]:
    """Hydra raises what it would else print before it exits; the environment is as before afterwards."""
    before = os.environ.get(TRACEBACKS)
    os.environ[TRACEBACKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRACEBACKS]
        else:
            os.environ[TRACEBACKS] = before


def _end(sentence: str, status: "str | int | None") -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(status)


def _sentence(error: BaseException) -> str:
    """The innermost cause as one line, with the key it is about and the nearest known one."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}: {_first_line(cause)}{_suggestion(cause)}"
    own = next((cause for cause in causes if isinstance(cause, InputError)), error)
    message = str(own).strip()
    if "Original Traceback" in message:  # from a data worker: the last line is the error, behind its class
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.partition("Config search path")[0].split())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _suggestion(error: OmegaConfBaseException) -> str:
    if "is not a ListConfig" in str(error):
        return f"; expected a list: '{error.full_key}=[...]'"
    owner = error.object_type
    if owner is None or not is_dataclass(owner) or not isinstance(error.key, str):
        return ""
    known = [field.name for field in fields(owner)]
    if error.key in known:
        return ""
    near = difflib.get_close_matches(error.key, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
