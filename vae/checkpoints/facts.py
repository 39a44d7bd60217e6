"""What a file states about itself, as Markdown. It may be a stranger's, so each value is taken by its type."""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 1_000  # characters of a value
ESCAPED = str.maketrans({"<": "&lt;", "&": "&amp;", "`": "'"} | {mark: f"\\{mark}" for mark in "\\|[]!*~#"})
EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # within a word it is none, and names stay legible


class Facts:
    """Values of a JSON object by type; what is absent or of another type is empty."""

    def __init__(self, values: object) -> None:
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}

    def of(self, name: str) -> "Facts":
        return Facts(self._values.get(name))

    def text(self, name: str) -> str:
        return words_of(self._values[name]) if name in self._values else ""

    def number(self, name: str) -> float | None:
        """Finite, and no integer beyond a float's range, which could not be written as one."""
        value = self._values.get(name)
        if type(value) is int:
            return value if abs(value) <= sys.float_info.max else None
        return value if isinstance(value, float) and math.isfinite(value) else None

    def code(self, name: str) -> str:
        """A string for between backticks, where nothing else has to be escaped."""
        value = self._values.get(name)
        return " ".join(value.split())[:LONGEST].replace("`", "'") if isinstance(value, str) else ""

    def matching(self, name: str, pattern: re.Pattern[str]) -> str | None:
        value = self._values.get(name)
        return value if isinstance(value, str) and pattern.fullmatch(value) else None

    def items(self) -> Iterator[tuple[str, str]]:
        """What is neither empty nor off."""
        return ((words_of(name), self.text(name)) for name, value in self._values.items() if value or value is False)


def words_of(value: object, depth: int = 3) -> str:
    """One line of about so many characters at most, which Markdown and HTML take for plain words.

    So no file brings an image, a link under another name or a tag into a card. What the user says `about` a run is
    plain words as well: it comes back out of files, and nothing tells it from a stranger's. A bare address stays one.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(words_of(each, depth - 1) for each in value)[:LONGEST] if depth else "..."
    if isinstance(value, dict):
        pairs = (f"{words_of(key)} {words_of(each, depth - 1)}" for key, each in value.items())
        return ", ".join(pairs)[:LONGEST] if depth else "..."
    text = " ".join(str(value).split())[:LONGEST]
    return EMPHASIS.sub(r"\\_", text.translate(ESCAPED))
