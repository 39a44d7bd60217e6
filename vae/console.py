"""Two ways to say a line: about the run, and about what is wrong with it. Brackets and numbers stay as they are."""

from rich.console import Console


def say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
