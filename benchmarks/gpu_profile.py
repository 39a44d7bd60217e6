"""Where the time of a GPU goes: kernels by time of our decode and of our training step.

python benchmarks/gpu_profile.py [--model sd] [--decode 512x1] [--step 256x8] [--perceptual-weights FILE]
    [--channels-last] [--device cuda]

bfloat16: weights for the decode, autocast for the step. On a CPU the operators instead of kernels.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
from measuring import table
from ours import OurStep, build, step_config
from timing import surroundings
from torch.profiler import ProfilerActivity, profile

WARM_UP, CALLS, SHOWN = 3, 3, 25
GROUPS = {  # the first whose pattern is in a kernel's name
    "layout": r"nchwToNhwc|nhwcToNchw|transpose|permute",
    "normalisation": r"group_?norm|RowwiseMoments|ComputeFused|layer_?norm|GammaBeta|batch_norm|ComputeInternal",
    "attention": r"flash|fmha|attention|softmax",
    "optimiser": r"multi_tensor|foreach|fused_adam|FusedAdam|lerp",
    "convolution": r"conv|wgrad|dgrad|fprop|implicit|xmma|cudnn|sm\d+_.*(nhwc|nchw)",
    "matrix product": r"gemm|cublas|nvjet|cutlass|addmm|bmm|splitK",
    "compiled": r"triton",
    "upsampling": r"upsample",
    "pooling": r"pool",
    "copies": r"memcpy|memset|copy|cat|pad",
    "reductions": r"reduce|sum|norm",
    "elementwise": r"elementwise|silu|vectorized|mul|add|relu|abs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--decode", default="512x1")
    parser.add_argument("--step", default="256x8")
    parser.add_argument("--perceptual", default="vgg")
    parser.add_argument("--perceptual-weights")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    print(f"{surroundings(device)}\n* channels_last {given.channels_last}", flush=True)

    side, batch = map(int, given.step.split("x"))
    config = step_config(given.model, side, given.perceptual, given.perceptual_weights)
    module = build(config, device, channels_last=given.channels_last)
    images = (torch.rand(batch, 3, side, side, device=device) * 2 - 1).contiguous(memory_format=layout)
    step = OurStep(module, torch.bfloat16)
    print(_profiled(f"training step {given.model} {given.step}", lambda: step(images), device), flush=True)

    side, batch = map(int, given.decode.split("x"))
    network, inner = module.autoencoder.to(torch.bfloat16).eval(), side // config.model.downsample_factor
    latents = torch.randn(batch, config.model.latent_channels, inner, inner, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        print(_profiled(f"decode {given.model} {given.decode}", lambda: network.decode(latents), device), flush=True)


def _profiled(title: str, call: Callable[[], object], device: torch.device) -> str:
    """Groups, then single kernels: milliseconds of a call, share, launches of a call, name."""
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels = [(event.key, _microseconds(event, on_gpu), event.count) for event in profiled.key_averages()]
    kernels = sorted((one for one in kernels if one[1]), key=lambda one: -one[1])
    whole = sum(time for _, time, _ in kernels)
    groups: dict[str, list[float]] = {}
    for name, time, count in kernels:
        of_group = groups.setdefault(_group(name), [0.0, 0.0])
        of_group[0], of_group[1] = of_group[0] + time, of_group[1] + count
    grouped = sorted(((name, time, count) for name, (time, count) in groups.items()), key=lambda one: -one[1])
    titles = ["ms", "share", "launches", "name"]
    rows = [[_row(*one, whole) for one in part] for part in (grouped, kernels[:SHOWN])]
    tables = "\n\n".join(table(titles, part) for part in rows)
    return f"\n## {title}: {whole / 1000 / CALLS:.2f} ms of kernels a call\n\n{tables}"


def _microseconds(event: Any, on_gpu: bool) -> float:
    """A kernel's own time; on a CPU an operator's."""
    if not on_gpu:
        return event.self_cpu_time_total
    return event.self_device_time_total if str(event.device_type).endswith("CUDA") else 0.0


def _group(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _row(name: str, time: float, count: float, whole: float) -> list[str]:
    return [
        f"{time / 1000 / CALLS:.3f}",
        f"{time / whole:.1%}",
        f"{count / CALLS:.0f}",
        f"{name.replace('|', '/'):.110}",
    ]


if __name__ == "__main__":
    main()
