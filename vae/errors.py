"""The two ways a command ends early on purpose, and its exit statuses.

Every other exception is a defect of this package.
"""

BAD_INPUT, BAD_IMAGES, GATE_FAILED = 2, 3, 4  # exit statuses; a signal's is 128 + its number
NOT_FINITE, PROCESS_LOST, TIME_IS_UP, INTERRUPTED = 5, 6, 124, 130


class InputError(ValueError):
    """An input cannot be used. The message is one sentence: the file or key, what is wrong, and the remedy."""


class Stopped(SystemExit):
    """A run ended before its last update, and its checkpoints are whole. `code` is the exit status.

    It is a SystemExit, so that no library's `except Exception` keeps the run going.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def was_asked_for(self) -> bool:
        """Whether somebody wanted the end: by a signal, as Ctrl-C sends one, or by max_minutes."""
        return isinstance(self.code, int) and self.code >= TIME_IS_UP


def printable(text: str) -> str:
    """Return text that can be printed.

    File names may hold characters that move the cursor, and bytes that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def require(condition: bool, given: str, expected: str) -> None:
    """Raise InputError("`given`, expected `expected`") unless `condition` holds. `given` reads "key=value"."""
    if not condition:
        raise InputError(f"{given}, expected {expected}")
