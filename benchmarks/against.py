"""This code beside an earlier commit of it: a training step, an encode and a decode, in turns, in one run.

python benchmarks/against.py COMMIT [--rounds 7] [--resolution 128]

Each turn is a process of its own with one thread, which times every part several times and keeps the shortest. Prints
markdown: the earlier time divided by ours, with its spread over the rounds. Above 1 this code is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def main() -> None:
    """Measure both commits in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.resolution)))
        return

    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", before, given.commit], cwd=ROOT, check=True)
        try:
            rounds = [(_turn(before, given.resolution), _turn(ROOT, given.resolution)) for _ in range(given.rounds)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)

    heading = f"{given.resolution} px, 1 thread, {given.rounds} rounds"
    print(f"| {heading} | {given.commit} / now | spread |\n| --- | --- | --- |")
    for part in rounds[0][0]:
        ratios = sorted(old[part] / new[part] for old, new in rounds)
        print(f"| {part} | {statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |")


def _turn(code: Path, resolution: int) -> dict[str, float]:
    """Run one turn of the code in a folder."""
    command = [sys.executable, __file__, "--child", "--resolution", str(resolution)]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=code, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(resolution: int) -> dict[str, float]:
    """Return the seconds of a step of the quick start's objective, and of SD's encoder and decoder."""
    import torch

    import vae
    from vae.training import module

    torch.manual_seed(0)
    kind = getattr(module, "AutoencoderModule", None) or module.Training  # its name in the first version
    config = vae.compose("experiment=quickstart", "loss.discriminator_start=0", "loss.adversarial_start=0")
    training = kind(config)
    training.objective.to(torch.device("cpu"))
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    batch = module.Batch(images, list(range(8)), [str(n) for n in range(8)], [])
    optimiser = torch.optim.Adam([p for p in training.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        training._pass(batch)[0].backward()
        optimiser.step()

    network = vae.AutoencoderKL(vae.AutoencoderConfig()).eval()
    large = torch.rand(1, 3, resolution, resolution) * 2 - 1
    with torch.no_grad():
        latents = network.encode(large).mode()
        times = {
            "encode": _shortest(lambda: network.encode(large)),
            "decode": _shortest(lambda: network.decode(latents)),
        }
    return {"step": _shortest(step)} | times


def _shortest(call: Callable[[], object]) -> float:
    """Return the shortest time of a call, after one that is not counted."""
    call()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
