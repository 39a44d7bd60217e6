"""How long help and refusals take: the median of ten starts, beside `python -c "import torch"`.

Usage: python benchmarks/start_up.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

VAE = str(Path(sys.executable).parent / "vae")
ROUNDS = 10
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "vae": [VAE],
    "vae -h": [VAE, "-h"],
    "vae --version": [VAE, "--version"],
    "python -m vae": [sys.executable, "-m", "vae"],
    "vae train --help": [VAE, "train", "--help"],
    "vae help data.crop_scale": [VAE, "help", "data.crop_scale"],
    "vae inspect --help": [VAE, "inspect", "--help"],
    "vae train data.resolutoin=64": [VAE, "train", "data.resolutoin=64"],
    "vae train lr=1e-4": [VAE, "train", "lr=1e-4"],
    "vae train experiment=quikstart": [VAE, "train", "experiment=quikstart"],
    "vae train data=folder data.root=/nope": [VAE, "train", "data=folder", "data.root=/nope"],
    "vae evaluate model=x modle=y": [VAE, "evaluate", "model=x", "modle=y"],
    "vae plan updates=x": [VAE, "plan", "updates=x"],
    "vae inspect nowhere": [VAE, "inspect", "nowhere"],
}


def seconds(command: list[str]) -> float:
    """Return the wall time of one start."""
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    """Time all commands in turn, round by round, so that other work on the machine is shared by all."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))

    torch = statistics.median(taken["import torch"])
    print("| command | median of ten | beside import torch |\n|---|---|---|")
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"| `{name}` | {median:.2f} s | {median / torch:.2f} |")


if __name__ == "__main__":
    main()
