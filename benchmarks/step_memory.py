"""Memory of a training step on a CPU, ours and the peers', each in a process of its own.

python benchmarks/step_memory.py [--model sd] [--resolution 256] [--batch 1] [--dtype bfloat16]

Resident memory at its highest within one generator and one discriminator update, above what the weights had taken:
activations, gradients, what kernels ask for. The optimisers' moments are equal on all sides and not counted.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import setting, table
from ours import OurStep, build, step_config
from resident import highest, resident, start_counting
from timing import DTYPES, MIB, record
from torch import Tensor, nn

from vae.config.schema import TrainConfig

VARIANTS = ("diffusers script", "LDM / sgm", "ours", "ours, gradient_checkpointing")
WARM_UP = 64  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--record", type=Path, help="append what was measured to this file, as JSON")
    given = parser.parse_args()
    size = f"{given.resolution} px, batch {given.batch}"
    print(f"## Memory of a training step: {given.model}, {size}, {given.dtype}\n\n{setting()}\n", flush=True)
    found: dict[str, tuple[float, float]] = {}
    for name in given.variants:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            found[name] = alone.apply(_measured, (name, given.model, given.resolution, given.batch, given.dtype))
    peaks = {name: peak for name, (peak, _) in found.items()}
    record(given.record, what="step memory", dtype=given.dtype, size=size, peaks=peaks)
    first = found[given.variants[0]][0]
    rows = [[name, f"{peak:.0f}", f"{peak / first:.2f}", f"{took:.1f}"] for name, (peak, took) in found.items()]
    print(table([f"{size}, {given.dtype}", "peak MiB", f"of {given.variants[0]}", "s, once"], rows))


def _measured(name: str, model: str, resolution: int, batch: int, dtype: str) -> tuple[float, float]:
    """(MiB, seconds)"""
    torch.manual_seed(0)
    config = step_config(model, resolution, "vgg", None)
    images = torch.rand(batch, 3, resolution, resolution) * 2 - 1
    step, networks = _step(name, config, None if dtype == "float32" else DTYPES[dtype])
    step(images[:, :, :WARM_UP, :WARM_UP])  # what libraries take once is nobody's
    for network in networks:
        network.zero_grad()
    device = torch.device("cpu")
    start_counting(device)
    before, start = resident(device), time.perf_counter()
    step(images)
    took = time.perf_counter() - start
    return (highest(device) - before) / MIB, took


def _step(name: str, config: TrainConfig, autocast: torch.dtype | None) -> tuple[Callable[[Tensor], object], list[Any]]:
    """Forwards and backwards of both updates, no optimiser's step; and the networks that learn."""
    from theirs import LdmStep, ScriptStep, authority

    base, _, option = name.partition(", ")
    module = build(config, torch.device("cpu"), **({option: True} if option else {}))
    module.ema_model.to("meta")
    if base == "ours":
        return OurStep(module, autocast).backward, list(module.networks.values())
    assert module.discriminator is not None
    assert module.objective.lpips is not None
    networks: tuple[Any, nn.Module] = (authority(module.autoencoder), module.discriminator)
    peer = (LdmStep if base == "LDM / sgm" else ScriptStep)(networks, module.objective.lpips, config, autocast)
    module.autoencoder.to("meta")

    def both(images: Tensor) -> None:
        peer.generator(images)
        peer.judge(images)

    return both, list(networks)


if __name__ == "__main__":
    main()
