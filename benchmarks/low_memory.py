"""Peak memory, time and error of whole, tiled and exact strip-wise decoding (or encoding), ours and diffusers'.

python benchmarks/low_memory.py [--model sd] [--half decode] [--size 2048] [--dtype float32] [--device cuda]
    [--maps 1.5 0.5] [--threads 1] [--growth 512 1024 2048 4096]

Every case is a process of its own. Peak memory is what the call took above what was there before it: of a GPU
torch's count, else resident memory, where Linux forgets its highest on request. A map is the activations of full
resolution and the fewest channels; `--maps` are further allowances for strips. `--growth` is strips only, of squares
of these sides. `--model` may have overrides behind it: "sd model.layers_per_block=1". Prints markdown; errors are the
largest differences from our whole result, where there is one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import table
from resident import highest, resident, start_counting
from theirs import authority
from timing import DTYPES, MIB, failure, record, surroundings
from torch import Tensor

from vae.config.compose import compose
from vae.evaluation.robustness import tiled
from vae.models.autoencoder_kl import AutoencoderKL
from vae.models.strips import decode_in_strips, encode_in_strips

THEIRS, OURS, STRIPS = "diffusers whole", "ours whole", "ours in strips"
CASES = [THEIRS, "diffusers tiled", OURS, "ours tiled", STRIPS]
WARM_UP = 64  # pixels, so that libraries have loaded what they load


def main() -> None:
    given = _arguments()
    if given.case:
        return print(json.dumps(_measured(given)))
    torch.set_num_threads(given.threads)
    print(f"## Low-memory {given.half}: {given.model}, {given.dtype}\n\n{surroundings(torch.device(given.device))}\n")
    with tempfile.TemporaryDirectory() as folder:
        if given.growth:
            print(_growth(given, Path(folder)))
        else:
            print(_comparison(given, Path(folder)))
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd")
    parser.add_argument("--half", choices=["encode", "decode"], default="decode")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--maps", nargs="*", type=float, default=[1.5, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", nargs="*", type=int, default=[])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--record", type=Path, help="append what was measured to this file, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _comparison(given: argparse.Namespace, folder: Path) -> str:
    names = [*given.cases, *(f"{STRIPS}, {maps:g} maps" for maps in given.maps)]
    found = {name: _child(given, name, given.size, folder / str(i)) for i, name in enumerate(names)}
    outputs = {name: folder / str(i) for i, name in enumerate(names)}
    done = {name: taken for name, taken in found.items() if taken is not None}
    errors = {name: _error(outputs[name], outputs[OURS]) if OURS in done else "" for name in done}
    peaks = {name: taken["peak"] / MIB for name, taken in done.items()}
    seconds = {name: taken["seconds" if given.device == "cuda" else "cpu"] for name, taken in done.items()}
    facts = {"dtype": given.dtype, "size": f"{given.size} px", "peaks": peaks, "seconds": seconds, "errors": errors}
    record(given.record, what=f"exact {given.half}", **facts)
    first, rows = found.get(THEIRS), []
    for name, taken in done.items():
        ratios = [f"{taken[key] / first[key]:.2f}" if first else "" for key in ("peak", "seconds", "cpu")]
        numbers = [f"{taken['peak'] / MIB:.0f}", f"{taken['seconds']:.1f}", f"{taken['cpu']:.1f}"]
        rows.append([name, *(cell for pair in zip(numbers, ratios, strict=True) for cell in pair), errors[name]])
    titles = [
        f"{given.size} px",
        "peak MiB",
        "/ diffusers",
        "s",
        "/ diffusers",
        "CPU s",
        "/ diffusers",
        "largest error",
    ]
    return table(titles, rows)


def _growth(given: argparse.Namespace, folder: Path) -> str:
    rows = []
    for size in given.growth:
        for name in [STRIPS, *(f"{STRIPS}, {maps:g} maps" for maps in given.maps)]:
            taken = _child(given, name, size, folder / "output")
            if taken is not None:
                peak, megapixels = taken["peak"] / MIB, size * size / 1e6
                cells = [peak, peak / megapixels, taken["seconds"], taken["seconds"] / megapixels]
                rows.append([str(size), name, *(f"{cell:.1f}" for cell in cells)])
    return table(["px", "", "peak MiB", "MiB a megapixel", "s", "s a megapixel"], rows)


def _child(given: argparse.Namespace, name: str, size: int, output: Path) -> dict[str, float] | None:
    """Its numbers; None, and a line, if it fails or does not fit."""
    options = {key: getattr(given, key) for key in ("model", "half", "dtype", "device", "threads")}
    options |= {"case": name, "size": size, "output": output}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        print(failure(f"{size} px, {name}", RuntimeError(reason[0])), flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _measured(given: argparse.Namespace) -> dict[str, float]:
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoencoderKL(compose(*f"model={given.model}".split()).model).eval().to(device, DTYPES[given.dtype])
    call = _call(given, model)
    factor, latent_channels = model.config.downsample_factor, model.config.latent_channels

    generator = torch.Generator().manual_seed(0)  # building diffusers' network draws from the other

    def given_of(size: int) -> Tensor:
        if given.half == "encode":
            return torch.rand(1, model.config.in_channels, size, size, generator=generator) * 2 - 1
        return torch.randn(1, latent_channels, size // factor, size // factor, generator=generator)

    small, x = (given_of(size).to(device, DTYPES[given.dtype]) for size in (WARM_UP, given.size))
    call(small)
    start_counting(device)
    before, start, cpu = resident(device), time.perf_counter(), time.process_time()
    made = call(x)
    peak = highest(device)  # waits for the GPU too
    taken = {"peak": peak - before, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    torch.save(made.cpu(), given.output)
    return taken


def _call(given: argparse.Namespace, model: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) to means of posteriors, or latents to images."""
    decodes, tile = given.half == "decode", model.config.sample_size // model.config.downsample_factor
    if given.case.startswith("diffusers"):
        theirs: Any = authority(model).eval()  # untyped upstream
        if given.case != THEIRS:
            theirs.enable_tiling()
        return (lambda x: theirs.decode(x).sample) if decodes else (lambda x: theirs.encode(x).latent_dist.mean)
    if given.case.startswith(STRIPS):
        maps = given.case.removeprefix(STRIPS).removesuffix(" maps").removeprefix(", ")
        map_bytes = model.config.block_out_channels[0] * given.size**2 * model.decoder.conv_in.weight.itemsize
        memory = int(float(maps) * map_bytes) if maps else None
        if decodes:
            return lambda x: decode_in_strips(model, x, memory)
        return lambda x: encode_in_strips(model, x, memory).mean
    whole = model.decode if decodes else lambda x: model.encode(x).mean
    if given.case == OURS:
        return whole
    sides = (tile, model.config.sample_size)
    return lambda x: tiled(whole, x, *(sides if decodes else sides[::-1]))


def _error(made: Path, wanted: Path) -> str:
    difference = torch.load(made, weights_only=True).float() - torch.load(wanted, weights_only=True).float()
    return f"{difference.abs().max().item():.1e}"


if __name__ == "__main__":
    main()
