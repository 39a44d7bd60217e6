"""Folders of made-up images, and runs on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from vae.config.data import DataConfig
from vae.config.schema import TrainConfig


def noise(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(folder: Path, name: str, values: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(folder / name)


def on(config: TrainConfig, root: Path, **data: object) -> TrainConfig:
    """`config` on a folder, validated on what lies in its `val`."""
    chosen = DataConfig(source="folder", root=str(root), resolution=32, batch_size=2, workers=0)
    return replace(config, data=replace(chosen, **data))


def with_corrupt_ones(folder: Path, whole: int, corrupt: int) -> set[str]:
    for number in range(whole):
        save(folder / "train", f"{number:03}.png", noise(40, 44, number))
    save(folder / "val", "a.png", noise(40, 40, 999))
    damaged = {f"{number:03}.png" for number in np.random.default_rng(3).choice(whole, corrupt, replace=False)}
    for name in damaged:
        data = (folder / "train" / name).read_bytes()
        (folder / "train" / name).write_bytes(data[: len(data) // 2])
    return damaged


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
