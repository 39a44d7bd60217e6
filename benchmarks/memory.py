"""Resident memory of the training loader over ten thousand images, of this process and its workers together.

python benchmarks/memory.py FOLDER [--images 10000]

The images of FOLDER are repeated through a list file as often as needed. Memory at an image is the median over the
batches of the 500 images up to it.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from itertools import cycle, islice
from pathlib import Path

import torch
from measuring import load_average, setting, table

from vae.config.data import DataConfig
from vae.data.decode import EXTENSIONS
from vae.data.loader import TrainingImages, shut_down, training_loader
from vae.data.sampler import EndlessSampler, Shuffled
from vae.data.sources import Source, folder_files, list_source

BATCH, SIDE, MEDIAN_OVER = 16, 256, 500
FIRST, STEP = 2000, 2000
LIMIT = 5.0  # MB of growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{setting()}\n* load average at the start {load_average()}\n", flush=True)
    marks = range(FIRST, given.images + 1, STEP)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = _repeated(given.folder.resolve(), given.images, Path(folder) / "images.txt")
        for workers in (0, 2):
            memory = _over_images(source, workers, given.images)
            at = [statistics.median(memory[(mark - MEDIAN_OVER) // BATCH : mark // BATCH]) for mark in marks]
            growth = at[-1] - at[0]
            verdict = "flat" if growth < LIMIT else f"over {LIMIT:.0f} MB"
            rows.append(
                [str(workers), *(f"{value:.1f}" for value in at), f"{max(memory):.1f}", f"{growth:+.1f}", verdict]
            )
    print(table(["workers", *(f"MB at {mark}" for mark in marks), "most", "growth", ""], rows))


def _repeated(folder: Path, count: int, file: Path) -> Source:
    names = folder_files(folder, EXTENSIONS, str(folder))
    file.write_text("".join(f"{folder / name}\n" for name in islice(cycle(names), count)))
    return list_source(file, None)


def _over_images(source: Source, workers: int, images: int) -> list[float]:
    """MB after each batch."""
    config = DataConfig(source="list", root="", resolution=SIDE, batch_size=BATCH, workers=workers)
    order = Shuffled(len(source), 0, (SIDE, SIDE))
    loader = training_loader(TrainingImages(source, order, config, 3, 0), EndlessSampler(order))
    memory = [_resident() for _ in islice(loader, images // BATCH)]
    shut_down(loader)
    return memory


def _resident() -> float:
    """MB of this process and its children; what they share counts in each."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = (int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
