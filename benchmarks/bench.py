"""What is promised of speed and memory, measured against the peers on this machine: `make bench`.

python benchmarks/bench.py [--device cpu] [--model sd] [--step 128x1] [--size 256x1] [--large 768] [--rounds 3]
    [--photos FOLDER] [--output FILE]

Sizes are pixels and batch: of the training step; of encode, decode and the memory of a step; pixels of the exact
decode. With `--photos` loading is measured too.

Each part is a script of this folder. Times are of variants in turns within one process, ratios within a round: median
(range); on a CPU they are CPU times of one thread, which other work on the machine disturbs least. Memory, and the
exact decode, are of a process each, once. Prints each part's own tables, and then one with all that is promised,
reached or not; ends with status 1 where a part failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measuring import ratio, table

HERE = Path(__file__).resolve().parent
SCRIPT, LDM, DIFFUSERS = "diffusers script", "LDM / sgm", "diffusers"
FAILED = "ended with status"
WHOLE, STRIPS = "diffusers whole", "ours in strips"
Line = dict[str, Any]  # of `timing.record`


def _faster(line: Line, against: str) -> str:
    return ratio(line["taken"][against], line["taken"]["ours"])


def _smaller(line: Line, against: str) -> str:
    return f"{line['peaks']['ours'] / line['peaks'][against]:.2f}"


def _share(line: Line, _: str) -> str:
    return f"{line['convolutions']['ours']:.2f}"


def _strips_peak(line: Line, against: str) -> str:
    return f"{line['peaks'][STRIPS] / line['peaks'][against]:.2f}"


def _strips_time(line: Line, against: str) -> str:
    return f"{line['seconds'][STRIPS] / line['seconds'][against]:.2f}"


def _strips_error(line: Line, _: str) -> str:
    return line["errors"][STRIPS]


class Promise(NamedTuple):
    """What is read of a line `kind`; on either device {type of number: limit}."""

    what: str
    kind: str
    against: str
    read: Callable[[Line, str], str]
    cpu: dict[str, float]
    cuda: dict[str, float]
    is_most: bool = False

    def row(self, dtype: str, limit: float, found: list[Line]) -> list[str]:
        said = f"{'at most' if self.is_most else 'at least'} {limit:g}"
        line = next((one for one in found if (one["what"], one["dtype"]) == (self.kind, dtype)), None)
        try:
            measured = self.read(line, self.against) if line else ""
        except KeyError:  # a variant that does not run here
            measured = ""
        if not line or not measured:
            return [self.what, self.against, "", dtype, said, "not measured", ""]
        value = float(measured.split()[0])
        reached = value <= limit if self.is_most else value >= limit
        return [self.what, self.against, line["size"], dtype, said, measured, "" if reached else "not reached"]


def _both(float32: float, bfloat16: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": bfloat16}


PEAK, TIME, ERROR = {"float32": 0.3}, {"float32": 1.2}, {"float32": 1e-4}  # of the exact decode
STEP = "training step, times faster"
PROMISES = [
    Promise(STEP, "step", SCRIPT, _faster, _both(1.9, 2.1), _both(2.5, 2.5)),
    Promise(STEP, "step", LDM, _faster, _both(1.4, 1.5), _both(1.8, 1.8)),
    Promise("decode, times faster", "decode", DIFFUSERS, _faster, _both(1.4, 1.3), _both(1.6, 1.6)),
    Promise("encode, times faster", "encode", DIFFUSERS, _faster, _both(1.2, 1.2), _both(1.5, 1.5)),
    Promise("memory of a step, share", "step memory", SCRIPT, _smaller, _both(0.5, 0.5), _both(0.6, 0.6), is_most=True),
    Promise("exact decode, memory, share", "exact decode", WHOLE, _strips_peak, PEAK, PEAK, is_most=True),
    Promise("exact decode, time, share", "exact decode", WHOLE, _strips_time, TIME, TIME, is_most=True),
    Promise("exact decode, largest error", "exact decode", "ours whole", _strips_error, ERROR, ERROR, is_most=True),
    Promise("decode, share of convolutions", "decode", "themselves", _share, _both(0.75, 0.75), _both(0.6, 0.6)),
]


def main() -> None:
    given = _arguments()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.jsonl"
        printed = [_part(script, [*map(str, options), "--record", str(file)]) for script, *options in _parts(given)]
        printed += [_part("loading.py", [given.photos])] if given.photos else []
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found: list[Line] = list(map(json.loads, lines))
    limits = [(promise, getattr(promise, given.device).items()) for promise in PROMISES]
    rows = [promise.row(dtype, limit, found) for promise, of in limits for dtype, limit in of]
    titles = ["ours", "and", "size", "type", "promised", "measured", ""]
    summary = f"## Promised and measured\n\n{table(titles, rows)}\n\nAll of it took {time.monotonic() - start:.0f} s."
    print(f"\n{summary}", flush=True)
    if given.output:
        given.output.write_text("\n\n".join([summary, *printed]) + "\n", encoding="utf-8")
    sys.exit(any(FAILED in one for one in printed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="sd")
    parser.add_argument("--step", default="128x1")
    parser.add_argument("--size", default="256x1")
    parser.add_argument("--large", type=int, default=768)
    parser.add_argument("--photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write all tables to this file too")
    return parser.parse_args()


def _parts(given: argparse.Namespace) -> Iterator[list[Any]]:
    shared = ["--device", given.device, "--model", given.model]
    (step_side, step_batch), (side, batch) = (size.split("x") for size in (given.step, given.size))
    for dtype in ("float32", "bfloat16"):
        of = ["--dtype", dtype, "--rounds", given.rounds]
        step = ["--resolution", step_side, "--batch", step_batch, "--variants", SCRIPT, LDM, "ours"]
        yield ["step.py", *shared, *of, *step]
        yield ["inference.py", *shared, *of, "--sizes", given.size, "--variants", DIFFUSERS, "ours"]
        if given.device == "cpu":  # a GPU's comes with the step
            memory = ["--resolution", side, "--batch", batch, "--dtype", dtype]
            yield ["step_memory.py", "--model", given.model, *memory, "--variants", SCRIPT, "ours"]
    cases = ["--cases", WHOLE, "ours whole", STRIPS, "--maps"]
    yield ["low_memory.py", *shared, "--dtype", "float32", "--size", given.large, *cases]


def _part(script: str, options: list[str]) -> str:
    """What it printed, which is shown as it comes."""
    words = [sys.executable, str(HERE / script), *options]
    print(f"\n$ {script} {' '.join(options)}\n", flush=True)
    lines: list[str] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=HERE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        lines.append(f"* {script} {FAILED} {process.returncode}\n")
        print(lines[-1], flush=True)
    return "".join(lines).strip()


if __name__ == "__main__":
    main()
