"""Every key of a config in words: the text of `--help`, and docs/configuration.md. Both are read from the fields.

`python -m vae.config.reference` prints docs/configuration.md.
"""

import difflib
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from vae.config.fields import walk
from vae.config.overrides import OF_OTHERS
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = PACKAGE / "configs"  # where a wheel puts them
CONFIGS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "configs"

PAGE = """# Configuration

Every key of `vae train` (`python train.py`) and `vae evaluate` (`python evaluate.py`). Write `key=value`, for example
`data.batch_size=8`. `null` is no value, `[a,b]` is a list. This page is made from `vae/config/`; do not edit it.

The defaults below hold where no group says otherwise. An evaluation's `data` groups measure every image that they find,
and its folder is named by the time.

*resume* marks keys that may have another value when a run is resumed.
"""


def groups(command: str) -> dict[str, list[str]]:
    """Return {group: its choices} of `configs/` for "train" or "evaluate"."""
    folder = CONFIGS if command == "train" else CONFIGS / "evaluate"
    found = {
        each.name: sorted(file.stem for file in each.glob("*.yaml"))
        for each in sorted(folder.iterdir())
        if each.is_dir()
    }
    found.pop("evaluate", None)
    return found


def help_text(command: str, width: int | None = None) -> str:
    """Return what `--help` prints: groups, then each key with its default, its sentence and its allowed values.

    `width` is that of the terminal unless given; lines have at most 100 characters.
    """
    schema = TrainConfig if command == "train" else EvaluateConfig
    width = min(width or shutil.get_terminal_size().columns, 100)

    lines = [
        f"{_first_sentence(schema)}",
        "",
        f"Usage: vae {command} [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "",
        "Groups:",
    ]

    for group, choices in groups(command).items():
        lines += textwrap.wrap(f"{group}: {', '.join(choices)}", width, initial_indent="  ", subsequent_indent="      ")

    lines += ["", "Defaults hold where no group says otherwise."]
    if command == "train":
        lines += ["*resume* marks keys that may have another value when a run is resumed."]
    for heading, keys in _sections(schema):
        lines += ["", f"{heading}"]
        for key, one, default in keys:
            lines.append(f"  {key}={_shown(default)}")
            lines += textwrap.wrap(_sentence(one), width, initial_indent="      ", subsequent_indent="      ")

    return "\n".join(lines) + "\n"


def help_of(asked: str) -> str:
    """Return what there is to know of a key, or of all keys with `asked` in their name, for `vae help`.

    Raises InputError where there is none.
    """
    found: dict[tuple[str, str], list[str]] = {}  # (a key with its default, its sentence): the commands that have it
    for command, schema in (("train", TrainConfig), ("evaluate", EvaluateConfig)):
        known = [entry for _, keys in _sections(schema) for entry in keys]
        exact = [entry for entry in known if entry[0] == asked]
        for key, one, value in exact or [entry for entry in known if asked in entry[0]]:
            found.setdefault((f"{key}={_shown(value)}", _sentence(one)), []).append(f"vae {command}")

    if not found and asked in OF_OTHERS:
        raise InputError(f"{asked}: not a key of vae; ours is {OF_OTHERS[asked]}")
    if not found:
        near = difflib.get_close_matches(asked, [key for key, _, _ in walk(TrainConfig())], n=1, cutoff=0.4)
        raise InputError(f"{asked}: no such key{f'; did you mean {near[0]}?' if near else ''}")
    lines = []
    for (shown, sentence), commands in found.items():
        lines.append(f"{shown}  ({', '.join(commands)})")
        lines += textwrap.wrap(sentence, 76, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [PAGE]
    for command, schema in (("train", TrainConfig), ("evaluate", EvaluateConfig)):
        parts.append(f"\n## vae {command}\n")

        listed = [
            f"`{group}`: {', '.join(f'`{one}`' for one in choices)}" for group, choices in groups(command).items()
        ]
        parts.append(
            "Groups choose several values at once, as `model=sd`:\n\n" + "\n".join(f"- {one}" for one in listed) + "\n"
        )

        for heading, keys in _sections(schema):
            parts.append(f"\n### {heading}\n\n| key | default | |\n| --- | --- | --- |")
            parts += [
                f"| `{key}` | `{_shown(default)}` | {_sentence(one).replace('|', chr(92) + '|')} |"
                for key, one, default in keys
            ]
            parts.append("")

    return "\n".join(parts)


def _sections(schema: type) -> Iterator[tuple[str, list[tuple[str, Field[Any], Any]]]]:
    """Yield (heading, [(key, field, default)]) of the config itself, then of each of its parts."""
    config = example_of(schema)
    yield from _section(config, "", "The run" if schema is TrainConfig else "The evaluation")


def _section(config: Any, prefix: str, heading: str) -> Iterator[tuple[str, list[tuple[str, Field[Any], Any]]]]:
    """Yield a config's own keys under `heading`, then the sections of the configs within it."""
    leaves = [one for one in fields(config) if not is_dataclass(getattr(config, one.name))]
    yield heading, [(f"{prefix}{one.name}", one, getattr(config, one.name)) for one in leaves]
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from _section(
                value, f"{prefix}{one.name}.", f"{prefix}{one.name}: {one.metadata['text'].rstrip('.').lower()}"
            )


def example_of(schema: type) -> Any:
    """Return a config with all defaults."""
    if schema is TrainConfig:
        return TrainConfig()

    # An evaluation refuses to be built without a model, so its default is put back afterwards.
    config = EvaluateConfig(model="runs/first")
    config.model = None
    return config


def _sentence(one: Field[Any]) -> str:
    """Return a field's sentence with its unit, its allowed values, and whether it may change at resume."""
    text = one.metadata["text"]
    unit = one.metadata.get("unit")
    if unit:
        text += f" In {unit}."

    allowed = one.metadata.get("allowed")
    if allowed is not None:
        text += f" Allowed: {allowed.words}."
    if one.metadata.get("may_change"):
        text += " *resume*"
    return text


def _shown(value: Any) -> str:
    """Return a value as YAML and the command line write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "''" if value == "" else str(value)


def _first_sentence(schema: type) -> str:
    """Return the first line of a config's docstring."""
    return (schema.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(page(), end="")
