"""Data sets of Hugging Face `datasets`: by hub name, or folders of images, parquet and arrow on disk."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vae.data.decode import Encoded
from vae.data.sources import Computed, Names, Source
from vae.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


SAVED = ("state.json", "dataset_dict.json")  # files that Dataset.save_to_disk and DatasetDict.save_to_disk write
SHARD_KINDS = (".parquet", ".tar")


class Rows(Source):
    """The rows of a data set.

    `column` holds the images. It need not be named where only one column does.
    """

    def __init__(self, dataset: "Dataset", split: str, column: str | None) -> None:
        from datasets import Image

        self._column = _image_column(dataset, column)
        try:
            self._rows = dataset.select_columns([self._column]).cast_column(self._column, Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            kind = type(dataset.features[self._column]).__name__
            raise InputError(f"data.column={self._column!r}: no images ({kind}); name a column of images") from error
        self._split = split
        self.names = Computed(len(dataset), self.name)

    def name(self, index: int) -> str:
        """Return the name of a row: "split/00000000", and so on."""
        return f"{self._split}/{index:08d}"

    def read(self, index: int) -> Encoded:
        """Return the image of a row: its bytes, or the path where they are."""
        value = self._rows[index][self._column] or {}
        if value.get("bytes") is not None:
            return value["bytes"]
        return Path(value["path"]) if value.get("path") else b""

    def fingerprint(self) -> str:
        """Hash where each image comes from and how many bytes it has.

        The folders that all paths have in common do not count.
        """
        images = self._rows.data.column(self._column)
        lengths: Any = pc.binary_length(pc.struct_field(images, "bytes"))  # pyright: ignore[reportAttributeAccessIssue]
        paths: Any = pc.fill_null(pc.struct_field(images, "path"), "")  # pyright: ignore[reportAttributeAccessIssue]

        digest = xxhash.xxh3_128(f"{self._split} {len(self)} {_relative(paths).fingerprint()}".encode())
        digest.update(pc.fill_null(lengths, -1).cast(pa.int64()).to_numpy())
        return digest.hexdigest()


def hub_source(
    root: str, split: str, column: str | None, key: str = "data.root", split_key: str = "data.split"
) -> Rows:
    """Open one split of a data set, which is fetched as a whole. A local one is mapped into memory.

    `key` and `split_key` are what errors call the data set and the split.
    """
    try:
        dataset = _loaded(root, split)
    except Exception as error:
        raise _refusal(root, key, error, f"{split_key}={split!r}") from error

    if not len(dataset):
        raise InputError(f"{key}={root!r}: no rows in {split_key}={split!r}; name another split")
    return Rows(dataset, split, column)


def hub_shards(root: str, split: str, key: str = "data.root") -> list[str]:
    """List the files of a split, to be read shard by shard.

    Raises InputError where there is no such split, or a file is neither .parquet nor .tar.
    """
    import datasets

    path = Path(root).expanduser()
    if path.is_file() and path.suffix in SHARD_KINDS:
        return [str(path)]

    try:
        files = datasets.load_dataset_builder(str(path) if path.exists() else root).config.data_files or {}
    except Exception as error:
        raise _refusal(root, key, error) from error

    if split not in files:
        raise InputError(f"data.split={split!r}: {root} has {', '.join(map(str, files)) or 'no files'}; name one of it")

    urls = [str(url) for url in files[split]]
    odd = next((url for url in urls if not url.endswith(SHARD_KINDS)), None)
    if odd:
        wrong = f"{key}={root!r} with data.streaming=true: {odd} is neither .parquet nor .tar"
        raise InputError(f"{wrong}; data.streaming=false fetches the data set as a whole")

    return urls


def _loaded(root: str, split: str) -> "Dataset":
    """Load one split of a data set from the hub, a folder or a file."""
    import datasets

    folder = Path(root).expanduser()
    if folder.is_file() and folder.suffix == ".arrow":
        return datasets.Dataset.from_file(str(folder))
    if any((folder / name).is_file() for name in SAVED):
        loaded = datasets.load_from_disk(str(folder))
        return loaded if isinstance(loaded, datasets.Dataset) else loaded[split]
    if folder.is_file() and folder.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files={split: str(folder)}, split=split)  # pyright: ignore
    return datasets.load_dataset(str(folder) if folder.exists() else root, split=split)  # pyright: ignore


def _refusal(root: str, key: str, error: Exception, split: str = "data.split") -> InputError:
    """Make the error for what `datasets` cannot load."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return InputError(
        f"{key}={root!r}: not to be had as a data set ({reason}); name one of the hub, a folder of images, "
        f"parquet or arrow files, or what save_to_disk wrote; {split} names the split"
    )


def _image_column(dataset: Any, wanted: str | None) -> str:
    """Return `wanted` if there is such a column, or else the only column of images."""
    from datasets import Image

    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if wanted is not None:
        if wanted in dataset.column_names:
            return wanted
        raise InputError(f"data.column={wanted!r}: the columns are {', '.join(dataset.column_names)}; name one of them")

    if len(images) != 1:
        told = f"{len(images)} columns of images among {', '.join(dataset.column_names)}"
        raise InputError(f"data.column is not set, and there are {told}; name one")
    return images[0]


def _relative(paths: Any) -> Names:
    """Return paths without the folders that all have in common.

    So a folder that has been moved has the same fingerprint.
    """
    ends = [path for path in pc.min_max(paths).as_py().values() if path is not None]  # pyright: ignore
    folder, slash, _ = os.path.commonprefix(ends).rpartition("/")  # noqa: RUF071
    return Names(pc.utf8_slice_codeunits(paths, len(folder + slash)).cast(pa.large_binary()))  # pyright: ignore
