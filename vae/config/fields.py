"""The parts of a config field: default, sentence, unit, allowed values, and whether it may change at resume.

A field is the one home of all that. `python train.py --help`, docs/configuration.md, the refusal of bad values and the
list of what a resumed run may change are read from it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from vae.errors import require

Value = TypeVar("Value")


@dataclass(frozen=True)
class Allowed:
    """A set of values: the test `holds`, and `words` for errors and the documentation."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self, meaning: str = "") -> "Allowed":
        """Return the same set with null in it. `meaning` says what null stands for."""
        words = f"{self.words}, or null{meaning and f' for {meaning}'}"
        return Allowed(words, lambda value: value is None or self.holds(value))


def choice(*names: str) -> Allowed:
    """Allow one of `names`."""
    return Allowed(f"one of {list(names)}", lambda value: value in names)


def some_of(*names: str) -> Allowed:
    """Allow a list of any of `names`."""
    return Allowed(f"some of {list(names)}", lambda value: set(value) <= set(names))


def at_least(lowest: float, meaning: str = "") -> Allowed:
    """Allow a finite number of at least `lowest`. `meaning` says what `lowest` itself stands for."""
    words = f"{lowest} ({meaning}) or more" if meaning else f"{lowest} or more"
    return Allowed(words, lambda value: lowest <= value < math.inf)


def positive(words: str = "a positive number") -> Allowed:
    """Allow a finite number above 0."""
    return Allowed(words, lambda value: 0 < value < math.inf)


def within(low: float, high: float, words: str) -> Allowed:
    """Allow a number from `low` to `high`, both included."""
    return Allowed(words, lambda value: low <= value <= high)


def below(high: float, words: str) -> Allowed:
    """Allow a number from 0 to below `high`."""
    return Allowed(words, lambda value: 0 <= value < high)


def option(  # noqa: PLR0913
    default: Value,
    text: str,
    *,
    allowed: Allowed | None = None,
    unit: str = "",
    may_change: bool = False,
    quiet: bool = False,
    term: str = "",
    chooses_images: bool = False,
    is_path: bool = False,
) -> Value:
    """Declare a dataclass field with everything there is to know about it.

    `text` is its sentence. `unit` is what its number counts. With `may_change` a run may be resumed with another value;
    the difference is reported, unless `quiet`. `term` names the loss term without which the field means nothing.
    `chooses_images` marks fields that decide which images a run sees, and how they are cut. `is_path` marks paths, and
    lists of them, in which `~` is the home directory.
    """
    metadata = {
        "text": text,
        "allowed": allowed,
        "unit": unit,
        "may_change": may_change,
        "quiet": quiet,
        "term": term,
        "chooses_images": chooses_images,
        "is_path": is_path,
    }

    # Each config gets its own list or dict.
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(
    kind: type[Value],
    text: str,
    *,
    may_change: bool = False,
    term: str = "",
    make: Callable[[], Value] | None = None,
) -> Value:
    """Declare a field that holds another config. `make` builds its default, else `kind()` does."""
    return field(default_factory=make or kind, metadata={"text": text, "may_change": may_change, "term": term})


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse every value of `config` that its field does not allow. Raises InputError with `prefix` before the key."""
    for one in fields(config):
        allowed: Allowed | None = one.metadata.get("allowed")
        if allowed is not None:
            value = getattr(config, one.name)
            require(allowed.holds(value), f"{prefix}{one.name}={value!r}", allowed.words)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (key, field, value) of each leaf of `config`, depth first. A key is dotted, as on the command line."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", one, value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to keys as they are written on a command line: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
