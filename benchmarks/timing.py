"""Time and memory of calls on a GPU or a CPU, in turns, and what they were measured on."""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import load_average, ratio, rotated, setting, table
from torch import Tensor

Calls = dict[str, Callable[[], object]]
Taken = dict[str, list[float]]  # milliseconds a call, one number a round
Peaks = dict[str, float]  # MiB above what was there before the call
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLE = 50.0  # milliseconds that a sample lasts on a GPU, at least
MIB = 2**20
WARM_UP, NOTABLE = 2, 5.0  # calls, seconds
COPIED, SIDE = 2**31, 8192  # bytes of the copy and side of the matrix product that give the ceilings


def device_as_asked(given: argparse.Namespace) -> torch.device:
    """By --device, with --threads of a CPU and --cudnn-benchmark in effect."""
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(given.threads)
    torch.backends.cudnn.benchmark = given.cudnn_benchmark
    return device


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Of one call: between two events on a GPU, CPU time of this process elsewhere."""
    if device.type != "cuda":
        start = time.process_time()
        for _ in range(repeats):
            call()
        return 1000.0 * (time.process_time() - start) / repeats
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    events[0].record()
    for _ in range(repeats):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / repeats


def in_turns(calls: Calls, device: torch.device, rounds: int) -> Taken:
    """Every call once a round (on a GPU as often as makes a sample), the first of a round another each time."""
    slowest = max(milliseconds(call, device) for call in calls.values())
    repeats = max(1, round(SAMPLE / slowest)) if device.type == "cuda" else 1
    taken: Taken = {name: [] for name in calls}
    for number in range(rounds):
        for name in rotated(list(calls), number):
            taken[name].append(milliseconds(calls[name], device, repeats))
    return taken


def warm_up(name: str, call: Callable[[], object], calls: Calls) -> None:
    """Into `calls`, if it runs."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    if (seconds := time.perf_counter() - start) > NOTABLE:
        print(f"* {name}: {seconds:.0f} s to warm up", flush=True)
    calls[name] = call


def failure(name: str, error: Exception) -> str:
    """One line of it."""
    return f"* {name} does not run: {type(error).__name__}: {' '.join(str(error).split()):.300}"


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB of the GPU that a call needs at most, above what lay there before it. NaN elsewhere."""
    if device.type != "cuda":
        return float("nan")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def median_and_range(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def comparison(title: str, taken: Taken, peaks: Peaks, images: int, more: dict[str, list[str]] | None = None) -> str:
    """Milliseconds an image, the ratio of every earlier row to each of ours within a round, peak memory.

    `more` are further columns by title.
    """
    names, more = list(taken), more or {}
    theirs = [name for name in names if not is_ours(name)]
    rows = []
    for place, name in enumerate(names):
        each = [value / images for value in taken[name]]
        faster = [ratio(taken[other], taken[name]) if is_ours(name) else "" for other in theirs]
        peak = f"{peaks[name]:.0f}" if name in peaks else ""
        rows.append([name, median_and_range(each), *faster, peak, *(column[place] for column in more.values())])
    titles = [title, "ms an image", *(f"{name} / ours" for name in theirs), "peak MiB", *more]
    return table(titles, rows)


def record(file: Path | None, **found: object) -> None:
    """One more line of JSON, for `bench.py` to make its table of."""
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            print(json.dumps(found), file=lines)


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in float64. NaN where anything is."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def surroundings(device: torch.device) -> str:
    """The machine, the GPU where there is one, the versions, what torch is told, the commit."""
    lines = [setting()]
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        backends: Any = torch.backends  # untyped
        lines += [
            f"* GPU: {about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors",
            f"* CUDA {torch.version.cuda}, cuDNN {backends.cudnn.version()}, cudnn.benchmark "
            f"{backends.cudnn.benchmark}, TF32 in convolutions {backends.cudnn.allow_tf32}, in matrix products "
            f"{backends.cuda.matmul.allow_tf32} (torch's defaults unless said otherwise)",
        ]
    else:
        lines.append(f"* {torch.get_num_threads()} threads, CPU time; load average {load_average()}")
    return "\n".join(lines)


def ceilings(device: torch.device) -> str:
    """What this GPU does at most here: a bfloat16 matrix product and a copy, of random numbers."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (COPIED,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: Calls = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    taken = {name: statistics.median(times) for name, times in in_turns(calls, device, 5).items()}
    flops, moved = 2 * SIDE**3 / taken["product"] / 1e9, 2 * COPIED / taken["copy"] / 1e9
    return f"* ceilings: bfloat16 matrix product {flops:.0f} TFLOP/s, copy {moved:.2f} TB/s read and written"
