"""What a command shows on a terminal: lines, warnings, progress bars and tables.

Results go to stdout. Warnings and progress bars go to stderr. Text is printed as it is: brackets are not markup,
numbers are not highlighted, and what cannot be printed is escaped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.progress import track as rich_track
from rich.table import Table

from vae.errors import printable

Item = TypeVar("Item")


def say(line: str = "") -> None:
    """Print one line to stdout, without wrapping it."""
    Console().print(printable(line), highlight=False, markup=False, soft_wrap=True)


def warn(line: str, kind: str = "warning") -> None:
    """Print one line to stderr, in yellow on a terminal and without wrapping it. `kind` is its first word."""
    shown = f"{kind}: {printable(line)}"
    Console(stderr=True).print(shown, highlight=False, markup=False, soft_wrap=True, style="yellow")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", styles: Mapping[str, str] | None = None
) -> None:
    """Print a table of text cells to stdout. `styles` has the colour of a row by the text of its last cell."""
    table = Table(*columns, title=title or None)
    for row in rows:
        table.add_row(*row, style=(styles or {}).get(row[-1], ""))
    Console(markup=False, highlight=False).print(table)


def track(items: Iterable[Item], total: int, label: str) -> Iterable[Item]:
    """Yield the items, and show a progress bar while they are used. It disappears at the end."""
    return rich_track(items, label, total, console=Console(stderr=True), transient=True)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., object]]:
    """Show a progress bar up to `total`, for work that is no loop over items. It disappears at the end.

    Yields `advance(amount=1)`, which moves the bar on.
    """
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount=1: bar.advance(task, amount)
