"""Encode and decode, ours and diffusers' in one process, eager, channels_last and compiled.

python benchmarks/inference.py [--model sd] [--sizes 256x8 512x1] [--halves encode decode] [--dtype bfloat16]
    [--device cuda] [--rounds 7] [--variants NAME ...] [--compile-mode default] [--threads 1]

`--dtype` is that of the weights. A size is pixels and batch. Prints markdown, and no number of a variant whose output
is not that of diffusers' network in float32. `convolutions` is how long the convolutions of a variant take when each is
timed alone on the same shapes, as a share of its own time; of compiled ones those of the same variant not compiled.
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from convolutions import convolutions_of, own_time
from theirs import authority
from timing import (
    DTYPES,
    Calls,
    Peaks,
    ceilings,
    comparison,
    device_as_asked,
    failure,
    in_turns,
    is_ours,
    peak_memory,
    record,
    relative_error,
    surroundings,
    warm_up,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vae.config.compose import compose
from vae.models.autoencoder_kl import AutoencoderKL

Networks = dict[str, Any]  # "ours" and "diffusers", whose network is untyped upstream
Half = Callable[[Tensor], Tensor]
COMPILED, CHANNELS_LAST = ", compiled", ", channels_last"
VARIANTS = [
    f"{name}{layout}{compiled}"
    for compiled in ("", COMPILED)
    for name in ("diffusers", "ours")
    for layout in ("", CHANNELS_LAST)
]
MOST = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}  # relative error against float32


def main() -> None:
    given = _arguments()
    device = device_as_asked(given)
    print(f"## Encode and decode: {given.model}, weights {given.dtype}\n\n{surroundings(device)}", flush=True)
    print(f"* {given.rounds} rounds; torch.compile mode {given.compile_mode}, fixed shapes")
    if device.type == "cuda":
        print(ceilings(device))
    torch.manual_seed(0)
    plain = AutoencoderKL(compose(f"model={given.model}").model).eval().to(device)
    networks: Networks = {"ours": plain, "diffusers": authority(plain).eval()}
    for size in given.sizes:
        for half in given.halves:
            print(f"\n{_measured(given, networks, half, *map(int, size.split('x')))}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--sizes", nargs="+", default=["256x8", "512x1"])
    parser.add_argument("--halves", nargs="+", choices=["encode", "decode"], default=["encode", "decode"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[: len(VARIANTS) // 2])
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, help="append what was measured to this file, as JSON")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    return parser.parse_args()


@torch.no_grad()
def _measured(given: argparse.Namespace, networks: Networks, half: str, side: int, batch: int) -> str:
    """The table of one size."""
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    x = images if half == "encode" else networks["ours"].encode(images).mean
    wanted, flops = _wanted(networks, half, x)
    calls: Calls = {}
    for name in given.variants:
        try:
            call = partial(_half(name, half, networks, dtype, given.compile_mode), _as(x, name, dtype))
            error = (
                _error(networks, name, half, x, wanted) if dtype == torch.float32 else relative_error(call(), wanted)
            )
            if not error < MOST[given.dtype]:
                raise ValueError(f"relative error {error:.1e}, expected less than {MOST[given.dtype]:g}")
            warm_up(name, call, calls)
        except Exception as error:  # measured without it
            print(failure(f"{half} {side} px, {name}", error), flush=True)
    if not calls:
        return ""
    peaks: Peaks = {name: peak_memory(call, device) for name, call in calls.items() if device.type == "cuda"}
    taken = in_turns(calls, device, given.rounds)
    middle = {name: statistics.median(times) for name, times in taken.items()}
    shares = {name: _alone(name, half, networks, x, dtype) / middle[name] for name in taken}
    size = f"{side} px, batch {batch}"
    record(given.record, what=half, dtype=given.dtype, size=size, taken=taken, peaks=peaks, convolutions=shares)
    columns = {
        "convolutions": [f"{share:.2f}" for share in shares.values()],
        "TFLOP/s": [f"{flops / middle[name] / 1e9:.3g}" for name in taken],
    }
    return comparison(f"{half} {size}", taken, peaks, batch, columns)


def _wanted(networks: Networks, half: str, x: Tensor) -> tuple[Tensor, int]:
    """diffusers' output in float32 without TF32, and its floating-point operations: what `TFLOP/s` is of."""
    counter = FlopCounterMode(display=False)
    with _exactly(), counter:
        wanted = _theirs(networks["diffusers"], half)(x)
    return wanted, counter.get_total_flops()


def _error(networks: Networks, name: str, half: str, x: Tensor, wanted: Tensor) -> float:
    """Of float32 the arithmetic is checked, eager and without TF32; what is timed is as torch has it."""
    with _exactly():
        call = _half(name.removesuffix(COMPILED), half, networks, torch.float32, "default")
        return relative_error(call(_as(x, name, torch.float32)), wanted)


def _exactly() -> Any:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _half(name: str, half: str, networks: Networks, dtype: torch.dtype, mode: str) -> Half:
    """A network of its own, of the type and layout that the name says."""
    network = deepcopy(networks[name.split(",")[0]]).to(dtype)
    if CHANNELS_LAST in name:
        network.to(memory_format=torch.channels_last)
    if name.endswith(COMPILED):
        pieces = network.blocks() if is_ours(name) else (network.encoder, network.decoder)
        for piece in pieces:
            piece.compile(dynamic=False, mode=mode)
    return _ours(network, half) if is_ours(name) else _theirs(network, half)


def _ours(network: AutoencoderKL, half: str) -> Half:
    return network.decode if half == "decode" else lambda images: network.encode(images).mean


def _theirs(network: Any, half: str) -> Half:
    if half == "decode":
        return lambda latents: network.decode(latents).sample
    return lambda images: network.encode(images).latent_dist.mean


def _as(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if CHANNELS_LAST in name else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)


def _alone(name: str, half: str, networks: Networks, x: Tensor, dtype: torch.dtype) -> float:
    eager = name.removesuffix(COMPILED)
    call = partial(_half(eager, half, networks, dtype, "default"), _as(x, name, dtype))
    return own_time(convolutions_of(call), x.device)


if __name__ == "__main__":
    main()
