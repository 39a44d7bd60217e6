"""Sources of images. A source has a name for each of its images, and a way to read it.

`Names` holds names by the million, and splits depend on a name alone. Sources are folders, lists in a file (.txt with a
path a line, .csv with a header, .jsonl with an object a line), and the photographs of scikit-image. Those of `hub` and
`shards` have modules of their own.
"""

import csv
import importlib.util
import io
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import xxhash
from torch import Tensor

from vae.data.decode import EXTENSIONS, Encoded, image_size, open_image, reraise_machine_errors
from vae.errors import InputError, require

CHUNK = 100_000  # names that are Python objects at a time
MOST_SNIFFED = 1_000  # files with a wrong suffix that are opened


class Names(Sequence[str]):
    """Strings in one block of memory: ten million cost their bytes and no object each, and forked workers share them.

    They are kept as the bytes that the file system has, so that names that are not UTF-8 survive.
    """

    def __init__(self, names: Any) -> None:
        """Take strings, bytes, or an Arrow array without nulls."""
        array: Any = names  # Any, because pyarrow has no types
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        elif not isinstance(array, pa.Array):
            array = pa.array([os.fsencode(name) for name in names], type=pa.large_binary())
        self._array: Any = array.cast(pa.large_binary())

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return os.fsdecode(self._array[index].as_py())

    def __iter__(self) -> Iterator[str]:
        for names in self.encoded():
            yield from map(os.fsdecode, names)

    def encoded(self) -> Iterator[list[bytes]]:
        """Yield all names as bytes, some at a time."""
        for start in range(0, len(self), CHUNK):
            yield self._array.slice(start, CHUNK).to_pylist()

    def take(self, indices: np.ndarray) -> "Names":
        """Return the names at these indices."""
        return Names(self._array.take(pa.array(indices)))

    def hashes(self) -> np.ndarray:
        """Return the hash of each name, (N,) uint64."""
        digests = (map(xxhash.xxh3_64_intdigest, names) for names in self.encoded())
        return np.fromiter(chain.from_iterable(digests), np.uint64, len(self))

    def fingerprint(self) -> str:
        """Hash all names in their order."""
        digest = xxhash.xxh3_128()
        if len(self):
            _, ends, data = self._array.buffers()
            ends = np.frombuffer(ends, np.int64)[self._array.offset :][: len(self) + 1]
            digest.update(np.diff(ends).tobytes())
            digest.update(memoryview(data)[ends[0] : ends[-1]])
        return digest.hexdigest()


class Computed(Sequence[str]):
    """Names that are computed when they are asked for: `name_of(number)`, for 0 <= number < `length`."""

    def __init__(self, length: int, name_of: Callable[[int], str]) -> None:
        self._length = length
        self._name_of = name_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._name_of(range(self._length)[index])


def split_by_hash(names: Names, fraction: float, at_least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (training, validation).

    Validation gets the names whose hash is in the lowest `fraction`, and never less than `at_least` of them, or a tenth
    of all where that is less. It is never empty. So a name's side depends on the name, and the split survives added
    images: where 10 * `at_least` are there already, none of them goes over to validation.
    """
    hashes = names.hashes()
    fewest = max(1, min(at_least, math.ceil(len(names) / 10)))

    # The bound is at most 2**64 - 2048, the largest float64 below 2**64.
    held_out = (
        hashes < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048)) if fraction < 1 else np.ones(len(hashes), bool)
    )
    held_out[np.argpartition(hashes, fewest - 1)[:fewest]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fewest_by_hash(names: Names, limit: int | None) -> np.ndarray:
    """Choose at most `limit` indices, ascending. The choice has no bias and ignores the order of the names."""
    if limit is None or len(names) <= limit:
        return np.arange(len(names))
    return np.sort(np.argsort(names.hashes(), kind="stable")[:limit])


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
# Suffixes of pictures that cannot be read here. They are counted and passed over.
OTHER_KINDS = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpf", ".jfif", ".ico", ".tga", ".dds", ".pcx", ".ppm", ".pgm"),
        *(".pbm", ".psd", ".psb", ".xcf", ".svg", ".eps", ".ai", ".pdf", ".exr", ".hdr", ".dcm", ".nii"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    )
)
LEFT_ALONE = "__MACOSX"  # a folder in zip archives made on a Mac


class Source(ABC):
    """Images by number. A data set of your own is a subclass with `names` and `read`.

    `names` identify the images in every table. `read` returns a file, the bytes of one, or pixels (C, H, W) as uint8 or
    uint16. `shards` are the numbers of images that lie together and are best read together, where that is so.
    """

    names: Sequence[str]
    shards: Sequence[int] | None = None

    @abstractmethod
    def read(self, index: int) -> Encoded:
        """Return an image: a path, its bytes, or a uint8 or uint16 tensor (C, H, W)."""

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """Return what an error calls the image."""
        return self.names[index]

    def open(self, index: int, channels: int = 3, bits: int = 8) -> Tensor:
        """Decode an image to pixels (C, H, W), as `open_image` does.

        Raises ImageError where the image is at fault, and InputError where the machine is.
        """
        with reraise_machine_errors(self.label(index)):
            return open_image(self.read(index), channels, bits, self.label(index))

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image without decoding it."""
        with reraise_machine_errors(self.label(index)):
            return image_size(self.read(index), self.label(index))

    def fingerprint(self) -> str:
        """Hash the names. The hash differs where images are added, removed, renamed or reordered."""
        return xxhash.xxh3_128("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()


class Files(Source):
    """Image files, by their paths below `root`."""

    def __init__(self, root: Path, names: "Names | Sequence[str]", passed_over: Sequence[str] = ()) -> None:
        """Take paths below `root`, and those of pictures there that are of no kind that can be read."""
        self.root = root
        self.passed_over = passed_over
        self._names = names if isinstance(names, Names) else Names(names)
        self.names = self._names

    def read(self, index: int) -> Encoded:
        """Return the path of an image."""
        return self.root / self.names[index]

    def label(self, index: int) -> str:
        """Return the path of an image, as an error shows it."""
        return str(self.root / self.names[index])

    def fingerprint(self) -> str:
        """Hash the names."""
        return self._names.fingerprint()

    def path_hashes(self) -> np.ndarray:
        """Return the hash of each file's whole path, (N,) uint64. Links in `root` are resolved."""
        root = os.fsencode(self.root.resolve())
        paths = (os.path.join(root, name) for names in self._names.encoded() for name in names)  # noqa: PTH118
        return np.fromiter(map(xxhash.xxh3_64_intdigest, paths), np.uint64, len(self))


class Photos(Files):
    """The photographs inside scikit-image's wheel. Each is decoded once."""

    def __init__(self, names: Sequence[str]) -> None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise InputError("data.source='photos' needs scikit-image: pip install scikit-image")
        super().__init__(Path(spec.origin).parent / "data", names)
        self.open = lru_cache(maxsize=None)(super().open)


class Part(Source):
    """Some images of another source."""

    def __init__(self, whole: Source, indices: np.ndarray) -> None:
        self.whole = whole
        self.indices = indices
        self.names = Computed(len(indices), self.name)

    def name(self, index: int) -> str:
        """Return the name of an image in the whole."""
        return self.whole.names[int(self.indices[index])]

    def read(self, index: int) -> Encoded:
        """Return an image of the whole."""
        return self.whole.read(int(self.indices[index]))

    def label(self, index: int) -> str:
        """Return what an error calls the image."""
        return self.whole.label(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Hash the whole source and which of its images are chosen."""
        return xxhash.xxh3_128(self.whole.fingerprint().encode() + self.indices.tobytes()).hexdigest()


def checked(source: Source) -> Source:
    """Return `source`. Raise InputError where it is not a source of distinct names, before it is trained on."""
    names = source.names
    given = type(source).__name__
    require(len(names) > 0 and not isinstance(names, str), f"{given}.names", "a sequence of one name or more")
    other = next((name for name in names if not isinstance(name, str)), None)
    require(other is None, f"{given}.names has {other!r}", "strings")
    require(len(set(names)) == len(names), f"{given}.names has some twice", "a name of its own for each image")
    return source


def folder_source(root: str | Path, key: str = "data.root") -> Files:
    """Open every image in a folder and its subfolders.

    `key` is what an error calls the folder.
    """
    others: list[str] = []
    names = folder_files(root, EXTENSIONS, f"{key}={str(root)!r}", others)
    return Files(Path(root).expanduser(), names, others)


def in_words(passed_over: Sequence[str], root: Path) -> str:
    """Say which pictures below `root` were passed over, counted by kind; "" where there are none."""
    if not passed_over:
        return ""
    counts = Counter(map(_suffix, passed_over))
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())
    words = f"{len(passed_over):,} pictures in {root} are of kinds that cannot be read, and are not used: {kinds}"

    # A suffix may be wrong. Only names decide what is read, so that a folder means the same images everywhere.
    known = next((name for name in passed_over[:MOST_SNIFFED] if _is_readable(root / name)), None)
    if known is None:
        return f"{words}; save them as PNG or JPEG to use them"
    return f"{words}; {known} is a JPEG or PNG all the same: rename such files"


def _is_readable(path: Path) -> bool:
    """Return whether a file begins as a JPEG or a PNG does."""
    try:
        with path.open("rb") as file:
            return file.read(8).startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
    except OSError:
        return False


def folder_files(root: str | Path, suffixes: Collection[str], given: str, others: list[str] | None = None) -> list[str]:
    """List files with one of `suffixes` below `root`, as sorted relative names.

    Links are followed, and each folder is read once. Hidden files and folders are skipped. `given` is what an error
    calls the folder. Pictures of OTHER_KINDS are added to `others`. Raises InputError where it is missing, not readable
    or without such files.
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
        # os.walk reads the folders that remain in this list.
        folders[:] = [name for name in sorted(folders, key=os.fsencode) if _is_new(Path(parent) / name, seen)]
        below = Path(parent).relative_to(folder)
        found = [name for name in files if _suffix(name) in suffixes and not name.startswith(".")]
        names += [(below / name).as_posix() for name in found]
        if others is not None and len(found) < len(files):
            unread = (name for name in files if _suffix(name) in OTHER_KINDS and not name.startswith("."))
            others += [(below / name).as_posix() for name in unread]

    if not names and others:
        raise InputError(f"{given}: {in_words(others, folder)}")
    if not names:
        raise InputError(f"{given}: nothing in it or below to read (looked for {', '.join(sorted(suffixes))})")

    return sorted(names, key=os.fsencode)  # the order of strings would be the locale's


def _suffix(name: str) -> str:
    """Return the suffix of a file's name in small letters. There are millions of names, so no Path is made."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Say whether a folder is to be read: not hidden, and not seen before. Then it is noted as seen."""
    if folder.name.startswith(".") or folder.name == LEFT_ALONE:
        return False

    identity = _identity(folder)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _identity(folder: Path) -> tuple[int, int]:
    """Return what identifies a folder, by whatever link it was reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino


COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path")  # columns to look for where none is named
BLOCK = 1 << 24  # bytes read at a time; no line may be longer


def list_source(path: str | Path, column: str | None, key: str = "data.root") -> Files:
    """Open the images of a list, in its order. Relative paths are below the folder of the list.

    Raises InputError where the list cannot be read or names no image, or where its first image is not there.
    """
    file = Path(path).expanduser()
    given = f"{key}={str(path)!r}"

    if not file.is_file():
        raise InputError(f"{given}: no such file; name a .txt, .csv or .jsonl list of images")
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{given}: an unknown kind of list, expected .txt, .csv or .jsonl")

    try:
        names = KINDS[kind](file, column, given) if file.stat().st_size else Names([])
    except (pa.ArrowInvalid, csv.Error, json.JSONDecodeError) as error:
        reason = ascii(" ".join(str(error).split())[:200])
        raise InputError(f"{given}: not readable as {kind} ({reason}); mend or remove that line") from error

    if not names:
        raise InputError(f"{given}: no path in it; put one on each line")

    _check_first(file.parent, names, given)
    return Files(file.parent, names)


def _of_text(file: Path, column: str | None, given: str) -> Names:
    """Read a .txt file: one path a line."""
    if column is not None:
        raise InputError(f"data.column={column!r}: {given} has no columns; leave it out")

    # A delimiter that no path has, so that each line is one column.
    parsing = pyarrow.csv.ParseOptions(delimiter="\x01", quote_char=False)
    return _of_table(file, "path", pyarrow.csv.ReadOptions(column_names=["path"], block_size=BLOCK), parsing)


def _of_csv(file: Path, column: str | None, given: str) -> Names:
    """Read the paths in a column of a .csv file with a header."""
    header = next(csv.reader(io.StringIO(_start(file).decode("utf-8-sig", "surrogateescape"), newline="")), [])
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return _of_table(file, _column(header, column, given), pyarrow.csv.ReadOptions(block_size=BLOCK), parsing)


def _of_objects(file: Path, column: str | None, given: str) -> Names:
    """Read the paths in a field of a .jsonl file, whose first object says which fields there are."""
    first = json.loads(_start(file).lstrip().partition(b"\n")[0].decode("utf-8-sig", "surrogateescape") or "{}")
    name = _column(first if isinstance(first, dict) else [], column, given)
    parsing = pyarrow.json.ParseOptions(pa.schema({name: pa.large_binary()}), unexpected_field_behavior="ignore")
    reading = pyarrow.json.ReadOptions(block_size=BLOCK)
    return Names(pyarrow.json.read_json(file, reading, parsing).column(name).drop_null())


KINDS: dict[str, Callable[[Path, str | None, str], Names]] = {".txt": _of_text, ".csv": _of_csv, ".jsonl": _of_objects}


def _of_table(file: Path, column: str, reading: pyarrow.csv.ReadOptions, parsing: pyarrow.csv.ParseOptions) -> Names:
    """Read one column alone, as bytes.

    So nothing has to be UTF-8, and the types of other columns are not guessed.
    """
    kinds = pyarrow.csv.ConvertOptions(
        include_columns=[column], column_types={column: pa.large_binary()}, null_values=[""], strings_can_be_null=True
    )
    return Names(pyarrow.csv.read_csv(file, reading, parsing, kinds).column(column).drop_null())


def _start(file: Path) -> bytes:
    """Read the beginning of a file."""
    with file.open("rb") as stream:
        return stream.read(BLOCK)


def _column(columns: Iterable[str], wanted: str | None, given: str) -> str:
    """Return the column of paths: `wanted`, or the first usual name that is there."""
    columns = list(columns)
    found = [name for name in ([wanted] if wanted else COLUMNS) if name in columns]
    if not found:
        looked = repr(wanted) if wanted else f"any of {', '.join(COLUMNS)}"
        shown = ascii(columns)[:200]
        raise InputError(f"{given}: its columns are {shown}; looked for {looked}: name one by data.column")
    return found[0]


def _check_first(folder: Path, names: Names, given: str) -> None:
    """Raise InputError where the first image of a list is not there. That tells wrong folders early."""
    try:
        is_there = (folder / names[0]).exists()
    except OSError:  # a name longer than the file system allows
        is_there = False
    if not is_there:
        first = ascii(str(folder / names[0]))[:300]
        raise InputError(f"{given}: its first image {first} is not there; relative paths are below the list's folder")


class Skipped(NamedTuple):
    """An image that was not used, and why. `is_corrupt` is False where it is only too small."""

    name: str
    reason: str
    is_corrupt: bool
