"""Where images come from: a source is a list of names and a way to open each."""

import hashlib
import importlib.util
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vae.data.images import EXTENSIONS, open_image
from vae.errors import InputError

TRAINING_PHOTOS = (
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "moon.png",
)
VALIDATION_PHOTOS = ("astronaut.png", "camera.png", "coins.png", "clock_motion.png", "cell.png")


class ImageFiles(Sequence[Image.Image]):
    """Image files, opened on demand. `names` are paths relative to `root` and identify the images in every table."""

    def __init__(self, root: Path, names: Sequence[str], channels: int = 3) -> None:
        self.root, self.names, self.channels = root, list(names), channels

    @classmethod
    def below(cls, root: str | Path, channels: int = 3, key: str = "data.root") -> "ImageFiles":
        """Every image in a folder and its subfolders; `key` is what an error calls the folder."""
        return cls(Path(root).expanduser(), folder_images(root, key), channels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:  # pyright: ignore[reportIncompatibleMethodOverride]
        return open_image(self.root / self.names[index], self.channels)


class Photos(ImageFiles):
    """The photographs inside scikit-image's wheel, each decoded once."""

    def __init__(self, names: Sequence[str], channels: int = 3) -> None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise InputError("data.source='photos' needs scikit-image: pip install scikit-image")
        super().__init__(Path(spec.origin).parent / "data", names, channels)
        self._open = lru_cache(maxsize=None)(super().__getitem__)

    def __getitem__(self, index: int) -> Image.Image:
        return self._open(index)


def folder_images(root: str | Path, key: str = "data.root") -> list[str]:
    """Image files below `root`, as sorted relative names; hidden files and folders are left out."""
    return folder_files(root, EXTENSIONS, f"{key}={str(root)!r}")


def folder_files(root: str | Path, suffixes: Collection[str], given: str) -> list[str]:
    """Files with one of `suffixes` below `root`, likewise; `given` is what an error calls the folder."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"{given}: no such folder; name an existing one")
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if Path(name).suffix.lower() in suffixes and not name.startswith(".")
        ]
    if not names:
        raise InputError(f"{given}: nothing in it or below to read (looked for {', '.join(sorted(suffixes))})")
    return sorted(names)


def split_by_hash(names: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation): a name's side depends on that name alone, so it survives additions to the folder.

    Validation is never empty: failing any other it gets the name with the smallest hash.
    """
    validation = {name for name in names if _share(name) < fraction} or {min(names, key=_share)}
    return [name for name in names if name not in validation], sorted(validation)


def fewest_by_hash(names: Sequence[str], limit: int | None) -> list[str]:
    """At most `limit` names, an unbiased choice that does not depend on their order; sorted."""
    return sorted(sorted(names, key=_share)[:limit])


def _share(name: str) -> float:
    """The name's place in [0, 1), by its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
