"""What a process or a GPU holds in memory, now and at most since a mark."""

import ctypes
import gc
from pathlib import Path

import torch


def start_counting(device: torch.device) -> None:
    """From here on the highest is of what follows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again and not counted
    Path("/proc/self/clear_refs").write_text("5")


def resident(device: torch.device) -> int:
    """Bytes there now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def highest(device: torch.device) -> int:
    """Bytes at most, when all that was asked of the device is done."""
    if device.type != "cuda":
        return _status("VmHWM")
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
