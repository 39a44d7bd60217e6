"""The door to Hydra: YAML groups and overrides become a typed config, or one line that says what is wrong.

Hydra is used here and nowhere else, and no DictConfig leaves this module. `HYDRA_FULL_ERROR=1` shows tracebacks.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae.config.overrides import prepared
from vae.config.reference import CONFIGS, example_of, help_text
from vae.config.schema import EvaluateConfig, TrainConfig, with_younger_keys
from vae.errors import BAD_INPUT, InputError, Stopped
from vae.run_dir import RunDir

TRACEBACKS = "HYDRA_FULL_ERROR"
SCHEMAS = {"train": (TrainConfig, "."), "evaluate": (EvaluateConfig, "evaluate")}  # with the folder of its YAML
PLAIN_WORDS = {  # the beginning of a message of Hydra: what it means to somebody who has not read its manual
    r"Value '(.*)' of type '\w+' could not be converted to Integer": "{!r} is not a whole number",
    r"Value '(.*)' of type '\w+' could not be converted to Float": "{!r} is not a number",
    r"Value '(.*)' of type '\w+' could not be converted to Boolean": "{!r} is not true or false",
    r"Value '(.*)' is not a valid bool": "{!r} is not true or false",
    r"field '.*' is not Optional": "null is no value for it",
    r"Key '(.*)' is not in struct": "no such key; another argument of lightning.Trainer needs a plus: +trainer.{}=",
    r"Key '(.*)' not in '\w+'": "no such key",
    r"Invalid value assigned: (\w+) is not a ListConfig": "it takes a list",
}


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
            words = HydraConfig.get().overrides.task
            action(OmegaConf.to_object(_with_saved_values(_with_chosen_groups(cfg, folder, words), schema)))
        except (InputError, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            _exit(_sentence(error), BAD_INPUT)
        except Stopped as stop:
            _exit(stop.message, stop.code, "" if stop.was_asked_for else "error: ")

    started_with = list(sys.argv)
    try:
        sys.argv = [program, *prepared(overrides, example_of(schema))]  # what Hydra reads
        with _raising_hydra():
            main()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        _exit(_sentence(error), BAD_INPUT)


def compose(*overrides: str) -> TrainConfig:
    """Return the config that `vae train OVERRIDES` would train with: compose("model=tiny", "updates=100").

    Raises InputError with the line that the command would print.
    """
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    try:
        words = prepared(overrides, TrainConfig())
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = _with_chosen_groups(hydra.compose("train", words), "", words)
        return cast(TrainConfig, OmegaConf.to_object(cfg))
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise InputError(_sentence(error)) from error


def _with_chosen_groups(cfg: Any, folder: str, words: Sequence[str]) -> Any:
    """Return `cfg` with the values of the groups that `words` choose in place of an experiment's values.

    Hydra lets an experiment win over every group. But a group on the command line is asked for, as `trainer=one_gpu`
    is, and must be what runs. Single keys among `words` win over both.
    """
    groups = {}
    keys = {}
    for word in words:
        key, equals, choice = word.lstrip("+").partition("=")
        file = CONFIGS / folder / key / f"{choice}.yaml"
        if equals and key != "experiment" and file.is_file():
            groups[key] = _values_of_group(file)
        elif equals and not key.startswith("hydra"):
            keys[key] = OmegaConf.select(cfg, key)

    chosen = OmegaConf.merge(cfg, groups)
    for key, value in keys.items():
        OmegaConf.update(chosen, key, value, force_add=True)
    return chosen


def _values_of_group(file: Path) -> Any:
    """Return the values of a group's choice, with those of the choices that it builds on."""
    values: Any = OmegaConf.load(file)
    bases = [_values_of_group(file.with_name(f"{base}.yaml")) for base in values.pop("defaults", [])]
    return OmegaConf.merge(*bases, values)


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
        values = with_younger_keys(json.loads(file.read_text(encoding="utf-8")))
        saved = OmegaConf.merge(OmegaConf.structured(schema), values)
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


def _exit(sentence: str, status: "str | int | None", kind: str = "error: ") -> None:
    """Print a sentence on stderr and end the process with this status."""
    print(f"{kind}{sentence}", file=sys.stderr)
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
    unread = next((cause.override for cause in causes if isinstance(cause, OverrideParseException)), None)
    if unread is not None:
        return f"{unread}: not readable as a value; a list is [1,2], a mapping {{a: 1}}, a text with marks 'in quotes'"
    choice = re.search(r"Could not find '([\w/]+)/(.*)'\s+Available options in '.*':((?:\s+\S+)+)", message)
    if choice is not None:
        known = choice[3].partition("Config search path")[0].split()
        return f"{choice[1]}={choice[2]}: no such choice{_nearest(choice[2], known)}"
    return " ".join(message.partition("Config search path")[0].split())


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, in plain words where they are known."""
    line = str(error).strip().splitlines()[0]
    for pattern, words in PLAIN_WORDS.items():
        found = re.match(pattern, line)
        if found is not None:
            return words.format(*found.groups())
    return line


def _suggestion(error: OmegaConfBaseException) -> str:
    """Return what to write instead of an unknown key or a value that is no list, or "" where nothing fits."""
    if "is not a ListConfig" in str(error):
        return f"; expected a list: '{error.full_key}=[...]'"
    owner = error.object_type
    if owner is None or not is_dataclass(owner) or not isinstance(error.key, str):
        return ""

    known = [field.name for field in fields(owner)]
    return "" if error.key in known else _nearest(error.key, known)


def _nearest(given: str, known: list[str]) -> str:
    """Return the known name that is nearest to `given`, or all of them, as the end of a sentence."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
