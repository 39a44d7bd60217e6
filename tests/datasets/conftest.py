from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import call as call
from tests.cli.conftest import model as model
from vae.distributed import WORLDS

SIZES = {
    "a.png": (40, 30),
    "b.jpg": (37, 60),
    "c.png": (64, 48),
    "d.png": (18, 20),
    "deep/a.png": (50, 50),
    "deep/e é.b.png": (100, 35),
    "f.png": (90, 20),
    "g.png": (33, 47),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*sum(WORLDS, ()), "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight smooth images with some noise, of eight sizes (width, height): among them a small and a long one."""
    return write_pictures(tmp_path / "pictures")


def write_pictures(folder: Path) -> Path:
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(height, width, seed)).save(folder / name, quality=95)
    return folder


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / a + columns / b + c) for a, b, c in random.uniform(4, 12, (3, 3))]
    values = 128 + 90 * np.stack(waves, axis=-1) + random.normal(0, 4, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of everything in a folder, hidden files too."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
