"""What is measured of each image, on disk as soon as it is known: a rerun goes on from there."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vae.errors import InputError

Line = dict[str, Any]  # of one image: dataset, index, image, and left_out or what each model made of it
Key = tuple[str, int]  # dataset, index


class Rows:
    """`rows_RANK.jsonl` of this process; those of all are read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._path = folder, folder / f"rows_{rank}.jsonl"

    def begin(self) -> None:
        """After a kill the last line may be cut: what follows begins a line of its own."""
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            shared = "output= must be one folder that all processes share"
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); {shared}") from error
        if self._file.tell():
            self._file.write(b"\n")

    def add(self, line: Line) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); make room, then go on") from error

    def end(self) -> None:
        self._file.close()

    def read(self) -> Iterator[Line]:
        """The whole lines of all processes, in no order."""
        for path in sorted(self.folder.glob("rows_*.jsonl")):
            with path.open("rb") as file:
                for text in file:
                    if (line := _parsed(text)) is not None:
                        yield line

    def are_there(self) -> bool:
        """Of any process, from before."""
        return any(self.folder.glob("rows_*.jsonl"))

    def known(self) -> set[Key]:
        """Of images that were measured; what could not be read may have been repaired."""
        return {key_of(line) for line in self.read() if "left_out" not in line}

    def forget(self) -> None:
        for path in self.folder.glob("rows_*.jsonl"):
            path.unlink()


def key_of(line: Line) -> Key:
    return line["dataset"], line["index"]


def packed(array: np.ndarray) -> list[Any]:
    """An array as JSON: dtype, shape, and its bytes in base64."""
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def unpacked(given: list[Any]) -> np.ndarray:
    dtype, shape, data = given
    return np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None  # a kill cut it
    return line if isinstance(line, dict) else None
