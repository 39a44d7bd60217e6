"""Upsampling as it is written, nearest neighbour and a convolution, beside the transposed convolution that it equals.

python benchmarks/upsampling.py [--sizes 512x32 512x64 256x128] [--batch 1] [--dtype float32] [--device cpu]

A size is channels and pixels of the small image. Forward, and backward to image and weights. Where the second is faster
in a training step, the device belongs into TRANSPOSED_ON of vae/models/fused.py.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measuring import ratio, table
from timing import DTYPES, device_as_asked, in_turns, median_and_range, relative_error, surroundings
from torch import Tensor, nn

from vae.models import fused

MOST = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}  # relative error
WRITTEN, TRANSPOSED = "nearest, convolution", "transposed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x32", "512x64", "256x128"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cudnn-benchmark", action="store_true")
    given = parser.parse_args()
    device, rows = device_as_asked(given), []
    fused.TRANSPOSED_ON = (device.type,)
    print(f"## Upsampling, {given.dtype}, batch {given.batch}\n\n{surroundings(device)}\n* {given.rounds} rounds\n")
    for size in given.sizes:
        for layout in (torch.contiguous_format, torch.channels_last):
            channels, side = map(int, size.split("x"))
            taken = _measured(given, channels, side, layout)
            name = f"{size}{', channels_last' if layout == torch.channels_last else ''}"
            rows += [
                [name, what, *(median_and_range(one) for one in both), ratio(*both)] for what, both in taken.items()
            ]
    print(table(["channels x pixels", "", f"ms, {WRITTEN}", f"ms, {TRANSPOSED}", "ratio"], rows))


def _measured(
    given: argparse.Namespace, channels: int, side: int, layout: torch.memory_format
) -> dict[str, list[list[float]]]:
    """{"forward": [milliseconds written, transposed], "forward and backward": ...}"""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1).to(given.device, DTYPES[given.dtype], memory_format=layout)
    x = torch.randn(given.batch, channels, side, side, device=given.device, dtype=DTYPES[given.dtype])
    x = x.contiguous(memory_format=layout).requires_grad_()
    calls: dict[str, Callable[[], Tensor]] = {
        WRITTEN: partial(_as_written, conv, x),
        TRANSPOSED: partial(fused.nearest_conv, conv, x),
    }
    error = relative_error(calls[TRANSPOSED](), calls[WRITTEN]())
    assert error < MOST[given.dtype], error
    towards = torch.randn_like(calls[WRITTEN]())
    passes = {"forward": _forward, "forward and backward": partial(_both, conv, x, towards)}
    found = {}
    for what, run in passes.items():
        every = {name: partial(run, call) for name, call in calls.items()}
        taken = in_turns(every, torch.device(given.device), given.rounds)
        found[what] = [taken[WRITTEN], taken[TRANSPOSED]]
    return found


def _as_written(conv: nn.Conv2d, x: Tensor) -> Tensor:
    with fused.layer_by_layer():
        return fused.nearest_conv(conv, x)


@torch.no_grad()
def _forward(call: Callable[[], Tensor]) -> None:
    call()


def _both(conv: nn.Conv2d, x: Tensor, towards: Tensor, call: Callable[[], Tensor]) -> None:
    torch.autograd.grad(call(), (x, *conv.parameters()), towards)


if __name__ == "__main__":
    main()
