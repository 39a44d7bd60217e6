"""CPU time of several ways to do the same, in turns, and what it was measured on."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import torch
import torchvision

Variants = dict[str, Callable[[], Iterator[object]]]  # each call begins a pass, each step of it is one batch
Rounds = dict[str, list[float]]  # CPU milliseconds per image, one number a round


def in_turns(variants: Variants, batches: int, batch_size: int, rounds: int) -> Rounds:
    """CPU time of this process. The variants take turns batch by batch, so that a burst of foreign load meets all."""
    taken: Rounds = {name: [] for name in variants}
    for number in range(rounds + 1):
        passes = {name: begin() for name, begin in variants.items()}
        spent = dict.fromkeys(variants, 0.0)
        for batch in range(batches):
            for name in rotated(list(variants), number + batch):
                start = time.process_time()
                next(passes[name])
                spent[name] += time.process_time() - start
        for name in variants if number else ():  # the first pass warms caches
            taken[name].append(1000.0 * spent[name] / (batches * batch_size))
    return taken


def with_children(variants: dict[str, Callable[[], None]], images: int, rounds: int) -> Rounds:
    """CPU time of this process and of its worker processes from their start to their end; whole passes in turns."""
    taken: Rounds = {name: [] for name in variants}
    for number in range(rounds):
        for name in rotated(list(variants), number):
            start = _cpu_seconds()
            variants[name]()
            taken[name].append(1000.0 * (_cpu_seconds() - start) / images)
    return taken


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def rate(milliseconds: list[float]) -> str:
    """Images per second and core: median (slowest to fastest round)."""
    return (
        f"{1000 / statistics.median(milliseconds):.0f} ({1000 / max(milliseconds):.0f}-{1000 / min(milliseconds):.0f})"
    )


def ratio(slower: list[float], faster: list[float]) -> str:
    """Of each round: median (range)."""
    ratios = [one / other for one, other in zip(slower, faster, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """In GitHub's markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def setting() -> str:
    """The machine, the versions and the commit, as markdown."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "versions": f"{versions}, pillow {PIL.__version__}, {sys.platform}",
        "commit": os.environ.get("COMMIT") or _commit(),  # named where the tree was copied without its history
    }
    return "\n".join(f"* {name}: {fact}" for name, fact in facts.items())


def load_average() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../vae"], cwd=here, capture_output=True)
    except FileNotFoundError:
        return "unknown, git is not there"
    return (found.stdout.strip() or "unknown") + (" with changes in vae/" if changed.returncode else "")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    numbers = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts['model name']} ({numbers})" if "model name" in facts else platform.processor()


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
