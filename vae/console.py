"""Two ways to print a line: `say` for the course of a run, `warn` for problems.

Lines are printed as they are: brackets are not markup and numbers are not highlighted.
"""

from rich.console import Console


def say(line: str) -> None:
    """Print `line` to standard output, without wrapping it."""
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """Print `line` to standard error, without wrapping it."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
