"""Where images come from: a source has a name for each and a way to read it."""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from torch import Tensor

from vae.data.images import EXTENSIONS, Encoded, image_size, open_image
from vae.data.limits import machine_apart
from vae.data.names import Computed, Names
from vae.errors import InputError, require

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
LEFT_ALONE = "__MACOSX"  # what zip archives made on a Mac bring along


class Source(ABC):
    """Images by number. A data set of your own is a subclass with `names` and `read`.

    `names` identify the images in every table; `read` gives a file, the bytes of one, or pixels (C, H, W) as uint8 or
    uint16. `shards` are the numbers of images that lie together and are best read together, where that is so.
    """

    names: Sequence[str]
    shards: Sequence[int] | None = None

    @abstractmethod
    def read(self, index: int) -> Encoded: ...

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """What an error calls the image."""
        return self.names[index]

    def open(self, index: int, channels: int = 3, bits: int = 8) -> Tensor:
        """Pixels (C, H, W), as `open_image` makes them; ImageError where the image is at fault."""
        with machine_apart(self.label(index)):
            return open_image(self.read(index), channels, bits, self.label(index))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) without decoding."""
        with machine_apart(self.label(index)):
            return image_size(self.read(index), self.label(index))

    def fingerprint(self) -> str:
        """Differs when images are added, removed, renamed or put into another order."""
        return xxhash.xxh3_128("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()


class Files(Source):
    """Image files, by path below `root`."""

    def __init__(self, root: Path, names: "Names | Sequence[str]") -> None:
        self.root, self._names = root, names if isinstance(names, Names) else Names(names)
        self.names = self._names

    def read(self, index: int) -> Encoded:
        return self.root / self.names[index]

    def label(self, index: int) -> str:
        return str(self.root / self.names[index])

    def fingerprint(self) -> str:
        return self._names.fingerprint()


class Photos(Files):
    """The photographs inside scikit-image's wheel, each decoded once."""

    def __init__(self, names: Sequence[str]) -> None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise InputError("data.source='photos' needs scikit-image: pip install scikit-image")
        super().__init__(Path(spec.origin).parent / "data", names)
        self.open = lru_cache(maxsize=None)(super().open)


class Part(Source):
    """Some images of another source."""

    def __init__(self, whole: Source, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices
        self.names = Computed(len(indices), self.name)

    def name(self, index: int) -> str:
        return self.whole.names[int(self.indices[index])]

    def read(self, index: int) -> Encoded:
        return self.whole.read(int(self.indices[index]))

    def label(self, index: int) -> str:
        return self.whole.label(int(self.indices[index]))

    def fingerprint(self) -> str:
        return xxhash.xxh3_128(self.whole.fingerprint().encode() + self.indices.tobytes()).hexdigest()


def checked(source: Source) -> Source:
    """Refuse what is no source of distinct names, before it is trained on."""
    names, given = source.names, type(source).__name__
    require(len(names) > 0 and not isinstance(names, str), f"{given}.names", "a sequence of one name or more")
    other = next((name for name in names if not isinstance(name, str)), None)
    require(other is None, f"{given}.names has {other!r}", "strings")
    require(len(set(names)) == len(names), f"{given}.names has some twice", "a name of its own for each image")
    return source


def folder_source(root: str | Path, key: str = "data.root") -> Files:
    """Every image in a folder and its subfolders; `key` is what an error calls the folder."""
    return Files(Path(root).expanduser(), folder_files(root, EXTENSIONS, f"{key}={str(root)!r}"))


def folder_files(root: str | Path, suffixes: Collection[str], given: str) -> list[str]:
    """Files with one of `suffixes` below `root`, as sorted relative names; `given` is what an error calls the folder.

    Links are followed, each folder read once. Hidden files and folders are left out.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        listed = "; data=list reads .txt, .csv and .jsonl files" if folder.is_file() else ""
        raise InputError(f"{given}: no such folder; name an existing one{listed}")

    def refuse(error: OSError) -> None:
        raise InputError(f"{given}: {error.filename}: {error.strerror}; make it readable") from error

    names: list[str] = []
    seen = {_identity(folder)}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders, key=os.fsencode) if _is_new(Path(parent) / name, seen)]
        below = Path(parent).relative_to(folder)
        names += [
            (below / name).as_posix()
            for name in files
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")  # noqa: PTH122  (by millions)
        ]
    if not names:
        raise InputError(f"{given}: nothing in it or below to read (looked for {', '.join(sorted(suffixes))})")
    return sorted(names, key=os.fsencode)  # of strings the order would be the locale's


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    if folder.name.startswith(".") or folder.name == LEFT_ALONE:
        return False
    identity = _identity(folder)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
