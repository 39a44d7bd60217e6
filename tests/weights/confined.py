"""Weights files read in processes of their own, where a crash, a hang or a hunger for memory harms nobody else.

One interpreter imports everything and forks for each file: `python -m tests.weights.confined PATH...`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vae.weights import load_autoencoder

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8 * 1024**3  # bytes of address space that a file may ask for before the system refuses
PATIENCE = 6  # seconds before a reader is ended by a signal


@dataclass(frozen=True)
class Outcome:
    """`error` is the kind of exception, "" where the file loaded; `died` the signal that ended the reader, or 0."""

    error: str = ""
    message: str = ""
    seconds: float = 0.0
    grown: int = 0  # bytes of resident memory, at its peak
    died: int = 0


def read_confined(paths: list[Path]) -> dict[Path, Outcome]:
    """What became of each file."""
    command = [sys.executable, "-m", "tests.weights.confined", *map(str, paths)]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    outcomes = [Outcome(**json.loads(line)) for line in printed.splitlines()]
    return dict(zip(paths, outcomes, strict=True))


def memory(field: str) -> int:
    """Bytes, by the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _read(path: str) -> Outcome:
    signal.alarm(PATIENCE)
    limit = memory("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, start = memory("VmRSS"), time.process_time()
    error = message = ""
    try:
        load_autoencoder(path)
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    return Outcome(error, message, time.process_time() - start, memory("VmHWM") - before)


def _main() -> None:
    for path in sys.argv[1:]:
        child = os.fork()
        if not child:
            os.write(sys.stdout.fileno(), json.dumps(asdict(_read(path))).encode() + b"\n")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            print(json.dumps(asdict(Outcome(died=os.WTERMSIG(status)))), flush=True)


if __name__ == "__main__":
    _main()
