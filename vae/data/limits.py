"""What is accepted as an image, before anything of it is decoded, and the one error for what is not."""

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae.errors import InputError

MAX_PIXELS = 100_000_000
MAX_CHANNELS = 4  # of an image of so many pixels; smaller ones may have more
MAX_BYTES = 200_000_000
MIN_SIDE, MAX_ASPECT = 8, 20
OF_THE_FILE = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class ImageError(InputError):
    """Something is not a usable image: names it, what is wrong and what to do."""


def refusal(label: str, reason: str, remedy: str = "replace or remove it") -> ImageError:
    return ImageError(f"{printable(label)}: {reason}; {remedy}")


def printable(name: str) -> str:
    """File names may hold what moves the cursor, and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


@contextmanager
def machine_apart(name: str) -> Iterator[None]:
    """An ImageError where the image is at fault, which will be so again; any other error where the machine is.

    A file system that went away, or memory that ran out, must not cost images that are whole.
    """
    try:
        yield
    except (ImageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, ImageError) else error
        failed = isinstance(cause, OSError) and cause.errno not in OF_THE_FILE
        if failed or isinstance(cause, MemoryError) or not isinstance(error, ImageError):
            reason = getattr(cause, "strerror", None) or type(cause).__name__
            raise InputError(f"{printable(name)}: {reason}; see to the machine and give the command again") from error
        raise


def check_status(path: Path, label: str) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise refusal(label, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise refusal(label, "not a regular file")
    check_length(status.st_size, label)


def check_length(length: int, label: str) -> None:
    if not 0 < length <= MAX_BYTES:
        raise refusal(label, f"{length} bytes, expected 1 to {MAX_BYTES}")


def check_size(width: int, height: int, label: str, channels: int = 1) -> None:
    """Before anything is decoded: a small file may ask for any amount of memory."""
    size = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise refusal(label, f"{size}, more than {MAX_PIXELS}", "shrink it first")
    if width * height * channels > MAX_PIXELS * MAX_CHANNELS:
        raise refusal(label, f"{size} of {channels} channels, more than {MAX_PIXELS * MAX_CHANNELS} values")
    if min(width, height) < MIN_SIDE:
        raise refusal(label, f"{size}, expected {MIN_SIDE} or more each way")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise refusal(label, f"{size}, longer than {MAX_ASPECT} times its shorter side", "crop it first")
