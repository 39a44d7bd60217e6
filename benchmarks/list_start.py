"""Seconds and memory from a list of ten million images to the first batch's picks, each kind in a process of its own.

python benchmarks/list_start.py [LINES]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

LINES = 10_000_000
AT_ONCE = 100_000
KINDS = {  # first line, line
    "txt": ("", "{folder:05d}/photo_{number:09d}.jpg\n"),
    "csv": ("path,label\n", "{folder:05d}/photo_{number:09d}.jpg,{folder}\n"),
    "jsonl": ("", '{{"path": "{folder:05d}/photo_{number:09d}.jpg", "label": {folder}}}\n'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", type=int, default=LINES)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            file = Path(folder) / f"images.{kind}"
            _write(file, lines)
            measured = subprocess.run([sys.executable, __file__, "--measure", file], check=True, capture_output=True)
            seconds = json.loads(measured.stdout)
            peak = seconds.pop("peak GB")
            steps = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            print(f"{kind}: {sum(seconds.values()):.1f} s ({steps}), {peak:.2f} GB at most, {lines} lines", flush=True)
            file.unlink()


def measure(file: Path) -> dict[str, float]:
    """Seconds of each step, and GB of memory at most."""
    clock = time.perf_counter
    times = [clock()]
    from vae.config.data import DataConfig
    from vae.data.build import open_sources
    from vae.data.sampler import order_of

    times.append(clock())
    config = DataConfig(source="list", root=str(file))
    sources = open_sources(config)
    times.append(clock())
    for source in sources:
        source.fingerprint()
    times.append(clock())
    order = order_of(sources[0], config, 0, 100, 8, lambda sizes, _: sizes)
    names = [sources[0].names[order.pick(position).number] for position in range(100)]
    times.append(clock())
    assert len(set(names)) == 100
    steps = ("import", "open", "fingerprint", "order")
    seconds = dict(zip(steps, (after - before for before, after in pairwise(times)), strict=True))
    return seconds | {"peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def _write(file: Path, lines: int) -> None:
    first, line = KINDS[file.suffix[1:]]
    with file.open("w") as stream:
        stream.write(first)
        for start in range(0, lines, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, lines))
            stream.writelines(line.format(folder=number // 1000, number=number) for number in numbers)
    (file.parent / "00000").mkdir(exist_ok=True)
    (file.parent / "00000" / "photo_000000000.jpg").touch()  # the first is looked for


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        main()
