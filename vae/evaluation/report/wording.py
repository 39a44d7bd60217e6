"""Numbers and names as the page writes them."""

import math
from collections.abc import Sequence

from vae.metrics.registry import METRICS

NOTHING, MINUS = "\u2013", "\u2212"  # typographic
LONGEST = 90  # characters of a name that are shown
JOINERS = "\u200c\u200d"  # letters of many scripts, and emoji, are joined or parted by these


def harmless(text: str) -> str:
    """Any text as one line: what is invisible, half a character, or turns the direction of writing, as its escape."""
    return text if text.isprintable() else "".join(_visible(character) for character in text)


def short(name: str) -> str:
    """Names of any length; the end tells files apart."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]} … {name[-LONGEST // 2 :]}"


def figure(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 4) -> str:
    """For numbers of any size."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}g}".replace("-", MINUS)


def measured(metric: str, value: float | None) -> str:
    """ "PSNR 31.245 dB" """
    about = METRICS[metric]
    return f"{figure(value, about.digits)} {about.unit}".rstrip()


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _visible(character: str) -> str:
    return character if character.isprintable() or character in JOINERS else repr(character)[1:-1]
