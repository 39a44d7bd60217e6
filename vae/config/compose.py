"""The door to Hydra: YAML groups and overrides become a typed config, or one line that says what is wrong.

Hydra is used here and nowhere else, and no DictConfig leaves this module. `HYDRA_FULL_ERROR=1` shows tracebacks.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae.config.reference import CONFIGS, help_text
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.errors import BAD_INPUT, InputError, Stopped
from vae.run_dir import RunDir

TRACEBACKS = "HYDRA_FULL_ERROR"
PATHS = ("data.root", "data.validation_root")
SCHEMAS = {"train": (TrainConfig, "."), "evaluate": (EvaluateConfig, "evaluate")}  # with the folder of its YAML
Config = TypeVar("Config")


def run(command: str, action: Callable[[Any], object], words: Sequence[str]) -> None:
    """Compose the config of `command` ("train" or "evaluate") from YAML and overrides, then call `action(config)`.

    `words` are the program's name and the overrides. Refused input, and a run that stops early, end the process with
    their exit status and one line on stderr. `--help` prints every key instead.
    """
    program, *overrides = words
    if {"--help", "-h"} & set(overrides):
        print(help_text(command), end="")
        return

    schema, folder = SCHEMAS[command]
    ConfigStore.instance().store(name=f"{command}_schema", node=schema)
    wants_traceback = os.environ.get(TRACEBACKS) == "1"

    @hydra.main(version_base="1.3", config_path=str(CONFIGS / folder), config_name=command)
    def main(cfg: Any) -> None:
        sys.argv = started_with  # Lightning starts a machine's other processes with it
        try:
            action(OmegaConf.to_object(_with_saved_values(cfg, schema)))
        except (InputError, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            _exit(_sentence(error), BAD_INPUT)
        except Stopped as stop:
            _exit(stop.message, stop.code)

    # Lightning's processes need the whole command line (`vae train ...`), Hydra the program and the overrides.
    started_with = [*sys.argv[: len(sys.argv) - len(overrides)], *map(_with_quotes, overrides)]
    sys.argv = [program, *map(_with_quotes, overrides)]  # what Hydra reads
    try:
        with _raising_hydra():
            main()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        _exit(_sentence(error), BAD_INPUT)


def compose(*overrides: str) -> TrainConfig:
    """Return the config that `vae train OVERRIDES` would train with: compose("model=tiny", "updates=100").

    Raises InputError with the line that the command would print.
    """
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return cast(TrainConfig, OmegaConf.to_object(hydra.compose("train", list(map(_with_quotes, overrides)))))
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise InputError(_sentence(error)) from error


def _with_quotes(argument: str) -> str:
    """Put quotes around a pattern or a path among the overrides.

    The shell has removed those that the user wrote, and Hydra would read braces and commas as its own syntax.
    """
    key, _, value = argument.partition("=")
    is_plain = key not in PATHS or not value or value[0] in "'\"" or "${" in value or value == "null"
    return argument if is_plain else "{}='{}'".format(key, value.replace("'", "\\'"))


def _with_saved_values(cfg: Any, schema: type) -> Any:
    """Return the saved config of the run that `resume=DIRECTORY` names, with the command line's values on top.

    Without such a run `cfg` is returned as it is. So it is where the command line chooses groups: then `cfg` describes
    the whole run again, and is later compared with the saved one.
    """
    resume = OmegaConf.select(cfg, "resume", default=None)
    file = RunDir(str(resume)).config
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
    """Make Hydra raise errors that it would otherwise print before exiting. The environment is restored afterwards."""
    before = os.environ.get(TRACEBACKS)
    os.environ[TRACEBACKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRACEBACKS]
        else:
            os.environ[TRACEBACKS] = before


def _exit(sentence: str, status: "str | int | None") -> None:
    """Print an error on stderr and end the process with this status."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(status)


def _sentence(error: BaseException) -> str:
    """Return the innermost cause as one line, with the key that it is about and the nearest known key."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)

    # OmegaConf's own error knows the key. It is often wrapped in one of Hydra's that does not.
    for cause in reversed(causes):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}: {_first_line(cause)}{_suggestion(cause)}"

    refusal = next((cause for cause in causes if isinstance(cause, InputError)), error)
    message = str(refusal).strip()
    if "Original Traceback" in message:  # from a data worker: the last line is the error, behind its class
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.partition("Config search path")[0].split())


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]


def _suggestion(error: OmegaConfBaseException) -> str:
    """Return what to write instead of an unknown key or a value that is no list, or "" where nothing fits."""
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
