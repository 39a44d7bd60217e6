"""The same tiny images in every form that training reads; each function writes them and says what a DataConfig says."""

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from PIL import Image

from vae.data.shards import add_member

IMAGES, HELD_OUT, SIDE = 12, 3, 8
PARTS = {"train": range(IMAGES), "val": range(IMAGES, IMAGES + HELD_OUT)}
Given = dict[str, Any]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path) -> Given:
    for part, numbers in PARTS.items():
        (root / part).mkdir(parents=True)
        for number in numbers:
            (root / part / f"{number:02d}.png").write_bytes(png(number))
    return {"source": "folder", "root": str(root)}


def as_list(root: Path, kind: str) -> Given:
    folder(root)
    for part, numbers in PARTS.items():
        names = [f"{part}/{number:02d}.png" for number in numbers]
        labels = [0, *(f"text {name}" for name in names[1:])]  # of two kinds
        pairs = list(zip(names, labels, strict=True))
        lines = {
            "txt": names,
            "csv": ["label,path", *(f'{label},"{name}"' for name, label in pairs)],
            "jsonl": [json.dumps({"label": label, "path": name}) for name, label in pairs],
        }
        (root / f"{part}.{kind}").write_text("\n".join(lines[kind]) + "\n\n")
    return {"source": "list", "root": str(root / f"train.{kind}"), "validation_root": str(root / f"val.{kind}")}


def image_folder(root: Path) -> Given:
    folder(root)
    (root / "val").rename(root / "validation")
    return hub(root)


def parquet(root: Path) -> Given:
    """Bytes in the tables, as `datasets` writes them, in three files for training."""
    root.mkdir(parents=True)
    for part, split in (("train", "train"), ("val", "validation")):
        rows = table(part)
        for shard in range(3):
            name = f"{split}-{shard:05d}-of-00003.parquet"
            rows.shard(3, shard, contiguous=True).to_parquet(str(root / name))
    return hub(root)


def saved(root: Path) -> Given:
    datasets.DatasetDict({"train": table("train"), "validation": table("val")}).save_to_disk(str(root))
    return hub(root)


def arrow(root: Path) -> Given:
    """One .arrow file, with the training images alone."""
    table("train").save_to_disk(str(root))
    return {"source": "huggingface", "root": str(next(root.glob("*.arrow")))}


def streaming(root: Path) -> Given:
    return parquet(root) | {"streaming": True}


def hub(root: Path) -> Given:
    return {"source": "huggingface", "root": str(root), "split": "train", "validation_split": "validation"}


def table(part: str) -> datasets.Dataset:
    rows = [{"path": f"{number:02d}.png", "bytes": png(number)} for number in PARTS[part]]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    return datasets.Dataset.from_dict({"label": list(PARTS[part]), "image": rows}, features=features)


def tars(root: Path, address: str = "{root}", shards: int = 3) -> Given:
    """Tar shards below the address of a file system."""
    base = address.format(root=root)
    filesystem, path = fsspec.core.url_to_fs(base)
    filesystem.makedirs(path, exist_ok=True)
    for part, numbers in PARTS.items():
        for shard in range(shards):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as archive:
                for number in numbers[shard::shards]:
                    add_member(archive, f"{number:02d}.png", png(number))
                    add_member(archive, f"{number:02d}.cls", b"7")
            filesystem.pipe_file(f"{path}/{part}-{shard}.tar", stream.getvalue())
    train = f"{base}/train-{{0..{shards - 1}}}.tar"
    return {"source": "webdataset", "root": train, "validation_root": f"{base}/val-*.tar"}


FORMS: dict[str, Callable[[Path], Given]] = {
    "folder": folder,
    "txt": partial(as_list, kind="txt"),
    "csv": partial(as_list, kind="csv"),
    "jsonl": partial(as_list, kind="jsonl"),
    "imagefolder": image_folder,
    "parquet": parquet,
    "saved": saved,
    "streaming": streaming,
    "tars": tars,
    "tars in memory": partial(tars, address="memory://shards{root}"),
    "tars by file URL": partial(tars, address="file://{root}"),
}
