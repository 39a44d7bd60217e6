"""The two ways a command ends early on purpose; everything else that is raised is a defect of ours."""

BAD_INPUT, BAD_IMAGES, GATE_FAILED = 2, 3, 4  # exit statuses; a signal's is 128 + its number
NOT_FINITE, PROCESS_LOST, TIME_IS_UP, INTERRUPTED = 5, 6, 124, 130


class InputError(ValueError):
    """Something given cannot be used. The message is one sentence: file or key, what is wrong, the remedy."""


class Stopped(SystemExit):
    """A run that ended before its last update, with its checkpoints whole. `code` is the status to exit with.

    A SystemExit, so that no library's `except Exception` keeps the run going.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


def require(condition: bool, given: str, expected: str) -> None:
    """Refuse `given` ("key=value") unless `condition` holds."""
    if not condition:
        raise InputError(f"{given}, expected {expected}")
