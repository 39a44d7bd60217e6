"""How the cost of our training step grows: with the resolution, the batch, and over two processes.

python benchmarks/scaling.py [--model sd] [--dtype bfloat16] [--resolutions 64 128 256 512] [--batches 1 2 4 8]
    [--device cpu] [--rounds 3]

LPIPS, GAN and adaptive weight are active. Work is counted as `plan=true` counts it. The two processes share gradients
through gloo on a CPU and NCCL on GPUs, as a run's do, with a batch each: what they reach together, of twice what one
reaches alone, is their efficiency; beside it stands what is left when they share nothing but the machine.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from measuring import table
from ours import OurStep, build, step_config
from timing import DTYPES, median_and_range, milliseconds, surroundings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vae.training.plan.cost import Meter
from vae.training.step import single_pass

SMALLEST = 64  # pixels, for the batches and the processes


def main() -> None:
    given = _arguments()
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)
    print(f"## Cost of a training step as work grows: {given.model}, {given.dtype}\n\n{surroundings(device)}")
    print(f"* {given.rounds} rounds\n", flush=True)
    sizes = [(side, 1) for side in given.resolutions] + [(SMALLEST, batch) for batch in given.batches if batch > 1]
    print(f"{_growth(given, device, sizes)}\n", flush=True)
    print(_together(given), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--shared", nargs="+", default=["64x1", "64x4", "128x1"], help="of the two processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _growth(given: argparse.Namespace, device: torch.device, sizes: list[tuple[int, int]]) -> str:
    step = _step(given, device, SMALLEST)
    step(_images(SMALLEST, 1, device))
    rows, first = [], 0.0
    for side, batch in sizes:
        images = _images(side, batch, device)
        with Meter() as meter:
            step.backward(images)
        taken = [milliseconds(partial(step, images), device) for _ in range(given.rounds)]
        megapixels, middle = batch * side**2 / 1e6, statistics.median(taken)
        first = first or middle / megapixels
        each = [
            f"{meter.flops / batch / 1e9:.0f}",
            f"{meter.flops / middle / 1e9:.3g}",
            f"{middle / megapixels / first:.2f}",
        ]
        rows.append([f"{side} px, batch {batch}", median_and_range(taken, 0), f"{middle / batch:.0f}", *each])
    return table(["", "ms an update", "ms an image", "GFLOP an image", "TFLOP/s", "ms a pixel, of the first"], rows)


def _step(given: argparse.Namespace, device: torch.device, side: int) -> OurStep:
    torch.manual_seed(0)
    module = build(step_config(given.model, side, "vgg", None), device)
    module.ema_model.to("meta")  # it takes no part
    return OurStep(module, None if given.dtype == "float32" else DTYPES[given.dtype])


def _images(side: int, batch: int, device: torch.device) -> Tensor:
    return torch.rand(batch, 3, side, side, device=device) * 2 - 1


class _Pass(nn.Module):
    """What DDP wraps: the networks, and a forward that gives the scalar to call backward on."""

    def __init__(self, step: OurStep) -> None:
        super().__init__()
        self.networks, self.step = nn.ModuleDict(step.module.networks), [step]  # in a list: not a part

    def forward(self, images: Tensor) -> Tensor:
        (step,), module = self.step, self.step[0].module
        autoencode = partial(module.autoencoding, list(range(len(images))))
        with torch.autocast(images.device.type, dtype=step.autocast, enabled=step.autocast is not None):
            return single_pass(images, autoencode, module.objective, module.adversarial_loss, 0)[0]


def _together(given: argparse.Namespace) -> str:
    rows = []
    for size in given.shared:
        side, batch = map(int, size.split("x"))
        alone = _processes(given, side, batch, 1)[0]
        apart, shared = _processes(given, side, batch, 2)
        middle = statistics.median(alone)
        cells = [median_and_range(one, 0) for one in (alone, apart, shared)]
        ratios = [f"{middle / statistics.median(one):.2f}" for one in (apart, shared)]
        rows.append([f"{side} px, batch {batch} each", *cells, *ratios])
    titles = ["", "ms, one alone", "ms, two apart", "ms, two sharing gradients", "efficiency apart", "sharing"]
    return table(titles, rows)


def _processes(given: argparse.Namespace, side: int, batch: int, count: int) -> list[list[float]]:
    """Milliseconds an update by the clock, of the slowest process: without sharing, and with where they are several."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/meet"
        with context.Pool(count) as pool:
            found: Any = pool.starmap(_member, [(given, side, batch, rank, count, where) for rank in range(count)], 1)
    return [[max(each) for each in zip(*kind, strict=True)] for kind in zip(*found, strict=True)]


def _member(given: argparse.Namespace, side: int, batch: int, rank: int, count: int, where: str) -> list[list[float]]:  # noqa: PLR0917
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = given.device == "cuda"
    torch.set_num_threads(given.threads)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=where, rank=rank, world_size=count)
    step = _step(given, device, side)
    wrapped = DistributedDataParallel(_Pass(step), gradient_as_bucket_view=True)  # without buffers
    images, taken = _images(side, batch, device), []
    for shares in (False, True)[:count]:
        times = []
        for number in range(given.rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            step.optimiser.zero_grad()
            with wrapped.no_sync() if not shares else torch.enable_grad():
                wrapped(images).backward()
            step.optimiser.step()
            if on_gpu:
                torch.cuda.synchronize()
            times += [1000 * (time.perf_counter() - start)] if number else []
        taken.append(times)
    dist.destroy_process_group()
    return taken


if __name__ == "__main__":
    main()
