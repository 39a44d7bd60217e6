"""What `vae plan` predicts of an update against what an update takes, each in processes of their own.

python benchmarks/predicted.py [--threads 1] [--updates 4] [--device cpu]

The prediction is the plan's. The measurement is of updates with Lightning's trainer around them, after the first, which
warms up: seconds by the wall, and the peak of the process (of a CPU the resident memory, of a GPU what its allocator
held). The last update has every part active. Prints markdown.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

CASES = {
    "tiny, 64 px, batch 8": ("model=tiny", "data.resolution=64", "data.batch_size=8"),
    "kl_f4, 64 px, batch 2": ("model=kl_f4", "data.resolution=64", "data.batch_size=2"),
    "sd, 64 px, batch 1": ("model=sd", "data.resolution=64", "data.batch_size=1"),
    "sd, 64 px, batch 4, checkpointed": (
        "model=sd",
        "data.resolution=64",
        "data.batch_size=4",
        "gradient_checkpointing=true",
    ),
}
ACTIVE = ("loss.discriminator_start=0", "loss.adversarial_start=0", "loss.adversarial_ramp=0")
GIB = 2**30


def main() -> None:
    given = _arguments()
    if given.part is not None:
        print(json.dumps({"predict": _predict, "measure": _measure}[given.part](given)))
        return
    import torch
    from measuring import load_average, table
    from timing import device_as_asked, surroundings

    device = device_as_asked(given)
    print(f"{surroundings(torch.device(device))}\n", flush=True)
    rows = []
    for name in CASES:
        predicted, measured = (_child(part, name, given) for part in ("predict", "measure"))
        seconds, memory = (measured[key] / predicted[key] for key in ("seconds", "bytes"))
        rows.append(
            [
                name,
                *(f"{one['seconds']:.2f}" for one in (predicted, measured)),
                f"{seconds:.2f}",
                *(f"{one['bytes'] / GIB:.2f}" for one in (predicted, measured)),
                f"{memory:.2f}",
                f"{predicted['took']:.0f}",
                load_average(),
            ]
        )
    titles = ["seconds an update: predicted", "measured", "ratio", "GiB at most: predicted", "measured", "ratio"]
    print(table(["case", *titles, "seconds to plan", "load"], rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--part", choices=["predict", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(part: str, case: str, given: argparse.Namespace) -> dict[str, float]:
    """Its numbers: in a process of its own, whose peak is then the case's."""
    asked = ["--part", part, "--case", case, "--threads", str(given.threads), "--updates", str(given.updates)]
    command = [sys.executable, __file__, *asked, "--device", given.device]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def _config(given: argparse.Namespace) -> Any:
    import torch

    from vae.config.compose import compose

    torch.set_num_threads(given.threads)
    accelerator = "cpu" if given.device == "cpu" else "gpu"
    return compose(*CASES[given.case], *ACTIVE, f"trainer.accelerator={accelerator}", "updates=1000")


def _predict(given: argparse.Namespace) -> dict[str, float]:
    from vae.training.plan.plan import plan

    config, start = _config(given), time.perf_counter()
    found = plan(config)
    took = time.perf_counter() - start
    assert found.phases[-1].seconds is not None
    return {"seconds": found.phases[-1].seconds, "bytes": found.memory.needed, "took": took}


def _measure(given: argparse.Namespace) -> dict[str, float]:
    import lightning
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    from vae.training.plan.cost import largest_size, random_batch
    from vae.training.train import build_module
    from vae.training.trainer import silence_lightning

    silence_lightning()
    config = _config(given)
    batch = random_batch(config, config.data.batch_size, largest_size(config), "cpu")
    times = [time.perf_counter()]

    class Batches(IterableDataset[object]):
        def __iter__(self) -> Iterator[object]:
            while True:
                yield batch

    class Clock(lightning.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            if given.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator=config.trainer["accelerator"],
            devices=1,
            precision=config.trainer["precision"],
            max_steps=given.updates,
            default_root_dir=folder,
            logger=False,
            callbacks=[Clock()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(build_module(config), DataLoader(Batches(), batch_size=None))
    taken = [after - before for before, after in pairwise(times[1:])]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": statistics.median(taken),
        "bytes": peak if given.device == "cpu" else torch.cuda.max_memory_reserved(),
    }


if __name__ == "__main__":
    main()
