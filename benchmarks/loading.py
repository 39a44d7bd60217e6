"""Images per second and core from a folder of JPEGs to batches of 256 pixels, ours and the peers' in one process.

python benchmarks/loading.py FOLDER [--images 400] [--rounds 7]

Decoders of simplejpeg, imagecodecs and PyTurboJPEG (its library by LIBTURBOJPEG) are measured where they are on
PYTHONPATH, and Pillow-SIMD in place of Pillow. Prints markdown, and no number if our pixels are not the named filter's.
"""

import argparse
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Rounds, Variants, in_turns, load_average, rate, ratio, setting, table, with_children
from parts import FILTERS, as_levels, cuts, decoders, difference, differences, passes
from peers import PEERS, RESIZED, SIDE, WHOLE, OurWindow, Transform, peer_loader, side_of_peers
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from vae.config.data import DataConfig
from vae.data.decode import EXTENSIONS, image_size
from vae.data.loader import Batch, TrainingImages, shut_down, training_loader
from vae.data.sampler import EndlessSampler, SampleIndex, Shuffled, seed_for
from vae.data.sources import Files, folder_files
from vae.data.transforms import to_model_range

BATCH, SEED = 16, 0
MOST, MEAN = 2, 0.01  # levels that our pixels may be from Pillow's antialiased bicubic on Pillow's decode
OURS = {"ours, largest square": WHOLE, "ours, 0.5 to 1 of it": RESIZED}
BYTES = ", uint8"  # not normalised
IDLE = "two workers without work"
RIVALS = {  # peers' rows and the one of ours that does the same
    "diffusers as it is: bilinear, centre crop": "ours, largest square",
    "v1 RandomCrop": "ours, largest square",
    "v2 RandomCrop": "ours, largest square",
    "v1, our whole windows": "ours, largest square",
    "v1 RandomResizedCrop": "ours, 0.5 to 1 of it",
    "v2 RandomResizedCrop": "ours, 0.5 to 1 of it",
    "v1, our resized windows": "ours, 0.5 to 1 of it",
}


class OnePass(EndlessSampler):
    """Every image once."""

    def __iter__(self) -> Iterator[SampleIndex]:
        assert isinstance(self.order, Shuffled)
        return islice(super().__iter__(), self.order.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = _large_enough(given.folder, given.images)
    print(f"{setting()}\n{_images(source)}\n* {given.rounds} rounds; load average at the start {load_average()}\n")
    for name, scale in OURS.items():
        print(f"* {name}: {_checked(source, scale)} levels from Pillow's bicubic")
    for measured in (_loaders, _loaders_with_workers, _decoders, _filters):
        print(f"\n{measured(source, given.rounds)}\n\nLoad average then {load_average()}.", flush=True)


def _large_enough(folder: Path, count: int) -> Files:
    """The first images of `folder` that ours does not leave out as too small, whole batches of them."""
    names = folder_files(folder, EXTENSIONS, str(folder))
    names = [name for name in names if min(image_size(folder / name)) >= SIDE][:count]
    return Files(folder, names[: len(names) // BATCH * BATCH])


def _files(source: Files) -> list[Path]:
    return [source.root / name for name in source.names]


def _images(source: Files) -> str:
    files = _files(source)
    sizes = np.array([image_size(file) for file in files])
    windows = {name: np.array([_side(OurWindow(scale), *size) for size in sizes]) for name, scale in OURS.items()}
    windows["RandomResizedCrop"] = np.array([side_of_peers(*size) for size in sizes])
    height, width = sizes.mean(0)
    kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
    lines = [f"* {len(files)} JPEGs, {width:.0f}x{height:.0f} pixels and {kilobytes:.0f} kB on average"]
    for name, sides in windows.items():
        share = np.mean(sides == SIDE)
        lines.append(f"* {name}: {np.mean(sides**2) / 1000:.0f} thousand source pixels, {share:.0%} not resized")
    return "\n".join(lines)


def _side(window: OurWindow, height: int, width: int) -> int:
    left, _, right, _ = window.draw(height, width)
    return right - left


def _checked(source: Files, scale: tuple[float, float]) -> str:
    """(largest / mean) difference of our batches from the named filter on the same windows; stops beyond it."""
    found, window = [], OurWindow(scale)
    for batch in _our_loader(source, scale):
        for pixels, position, name in zip(batch.images, batch.positions, batch.names, strict=True):
            torch.manual_seed(seed_for(SEED, position))
            named = window(Image.open(source.root / name).convert("RGB"))
            found.append(difference(as_levels(pixels), as_levels(named)))
    most, mean = max(most for most, _ in found), float(np.mean([mean for _, mean in found]))
    if len(found) != len(source) or most > MOST or mean > MEAN:
        raise SystemExit(f"{len(found)} images, {most} / {mean:.4f} levels from Pillow's bicubic: nothing is measured")
    return f"{most} / {mean:.4f}"


def _our_loader(source: Files, scale: tuple[float, float], workers: int = 0) -> DataLoader[Batch]:
    config = DataConfig(
        root=str(source.root), resolution=SIDE, batch_size=BATCH, workers=workers, crop_scale=list(scale)
    )
    order = Shuffled(len(source), SEED, (SIDE, SIDE))
    return training_loader(TrainingImages(source, order, config, 3, SEED), OnePass(order))


def _peer_batches(files: list[Path], transform: Transform) -> Iterator[Tensor]:
    yield from peer_loader(files, transform, BATCH, workers=0)


def _our_batches(source: Files, scale: tuple[float, float], is_normalised: bool) -> Iterator[Tensor]:
    for batch in _our_loader(source, scale):
        yield to_model_range(batch.images) if is_normalised else batch.images


def _loaders(source: Files, rounds: int) -> str:
    files = _files(source)
    variants: Variants = {name: partial(_peer_batches, files, transform) for name, transform in PEERS.items()}
    for name, scale in OURS.items():
        variants[name + BYTES] = partial(_our_batches, source, scale, False)
        variants[name] = partial(_our_batches, source, scale, True)
    kept = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8)
    variants["to_model_range alone"] = lambda: map(to_model_range, repeat(kept))
    taken = in_turns(variants, len(source) // BATCH, BATCH, rounds)
    rows = [[name, rate(taken[name]), _normalised(taken, name), _as_bytes(taken, name)] for name in variants]
    return table(["workers=0", "images/s/core", "ours / theirs, normalised", "ours / theirs, uint8"], rows)


def _loaders_with_workers(source: Files, rounds: int) -> str:
    files = _files(source)

    def peers(name: str) -> None:
        deque(peer_loader(files, PEERS[name], BATCH, workers=2), maxlen=0)

    def ours(scale: tuple[float, float]) -> None:
        loader = _our_loader(source, scale, workers=2)
        for batch in loader:
            to_model_range(batch.images)
        shut_down(loader)

    variants: dict[str, Callable[[], None]] = {name: partial(peers, name) for name in RIVALS if name.startswith("v1")}
    variants |= {name: partial(ours, scale) for name, scale in OURS.items()}
    variants[IDLE] = lambda: deque(DataLoader(TensorDataset(torch.zeros(2)), num_workers=2), maxlen=0).clear()
    taken = with_children(variants, len(source), rounds)
    idle = statistics.median(taken.pop(IDLE)) * len(source) / 1000
    rows = [[name, rate(taken[name]), _normalised(taken, name)] for name in taken]
    return (
        table(["workers=2, all processes", "images/s/core", "ours / theirs, normalised"], rows)
        + f"\n\nOf that, {idle:.2f} s of CPU a round begin and end the two workers."
    )


def _normalised(taken: Rounds, peer: str) -> str:
    return ratio(taken[peer], taken[RIVALS[peer]]) if peer in RIVALS else ""


def _as_bytes(taken: Rounds, peer: str) -> str:
    return ratio(taken[peer], taken[RIVALS[peer] + BYTES]) if peer in RIVALS else ""


def _decoders(source: Files, rounds: int) -> str:
    datas = [file.read_bytes() for file in _files(source)]
    return _parts("decode only", decoders(), datas, rounds)


def _filters(source: Files, rounds: int) -> str:
    return _parts("largest square to 256", FILTERS, cuts([file.read_bytes() for file in _files(source)]), rounds)


def _parts(title: str, parts: dict[str, Callable[[Any], Any]], items: list[Any], rounds: int) -> str:
    apart = differences(parts, items)
    taken = in_turns(passes(parts, items, BATCH), len(items) // BATCH, BATCH, rounds)
    first = taken[next(iter(parts))]
    rows = [[name, rate(taken[name]), ratio(first, taken[name]), apart[name]] for name in parts]
    return table([title, "images/s/core", "to the first", "levels apart: largest / mean"], rows)


if __name__ == "__main__":
    main()
