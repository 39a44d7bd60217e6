"""All the images that somebody names, undivided: what the sources of training are before a share is held out."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vae.data.config import DataConfig
from vae.data.hub import SAVED, hub_shards, hub_source
from vae.data.lists import list_source
from vae.data.shards import INDEX, open_shards
from vae.data.sources import TRAINING_PHOTOS, VALIDATION_PHOTOS, Photos, Source, folder_source
from vae.data.store import SCHEME, Store, expand
from vae.errors import InputError, require

LISTS, TABLES, ARCHIVE = (".txt", ".csv", ".jsonl"), (".parquet", ".arrow"), ".tar"
KEY = "SRC"  # what errors call it
ON_THE_COMMAND_LINE = {"data.column": "--column", "data.split": "--split", "data.streaming=true": "--streaming"}


@dataclass(frozen=True)
class Named:
    """`root` as somebody gave it; `kind` is one of data.source, None where the name tells.

    `note` is told of damaged archives, which are used as far as they go.
    """

    root: str
    note: Callable[[str], None]
    kind: str | None = None
    split: str = "train"
    column: str | None = None
    streaming: bool = False


def open_whole(named: Named) -> Source:
    """Every image of it."""
    kind = named.kind or kind_of(named.root)
    require(kind in WHOLE, f"--source {kind}", f"one of {sorted(WHOLE)}")
    hub = kind == "huggingface"
    require(hub or not named.streaming, "--streaming", "it with --source huggingface only")
    require(hub or named.split == Named.split, f"--split {named.split}", "it with --source huggingface only")
    require(hub or kind == "list" or named.column is None, f"--column {named.column}", "it with huggingface or list")
    try:
        return WHOLE[kind](named)
    except InputError as error:
        spoken = re.sub("|".join(map(re.escape, ON_THE_COMMAND_LINE)), lambda m: ON_THE_COMMAND_LINE[m[0]], str(error))
        raise InputError(spoken) from error


def kind_of(root: str) -> str:
    """By the name alone, and for a folder by what lies in it."""
    path = Path(root).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return "huggingface"
        prepared = (path / INDEX).is_file() and any(path.glob(f"*{ARCHIVE}"))
        return "webdataset" if prepared else "folder"
    if root.endswith(LISTS) and SCHEME not in root:
        return "list"
    if root.endswith(ARCHIVE) or SCHEME in root or set("{*?[") & set(root):
        return "webdataset"
    if root.endswith(TABLES):
        return "huggingface"
    if root == "photos":
        return "photos"
    remedy = "name a folder, a list, tar shards; --source huggingface takes it for a data set of the hub"
    raise InputError(f"{KEY}={root!r}: {'not a list or shard of images' if path.exists() else 'not there'}; {remedy}")


def _photos(_: Named) -> Source:
    return Photos(sorted(TRAINING_PHOTOS + VALIDATION_PHOTOS))


def _folder(named: Named) -> Source:
    return folder_source(named.root, KEY)


def _list(named: Named) -> Source:
    return list_source(named.root, named.column, KEY)


def _huggingface(named: Named) -> Source:
    if named.streaming:
        return open_shards(hub_shards(named.root, named.split, KEY), _store(), named.note, named.column)
    return hub_source(named.root, named.split, named.column, KEY)


def _webdataset(named: Named) -> Source:
    folder = Path(named.root).expanduser()
    pattern = str(folder / f"*{ARCHIVE}") if folder.is_dir() else named.root
    return open_shards(expand(pattern, KEY), _store(), named.note)


WHOLE: dict[str, Callable[[Named], Source]] = {
    "photos": _photos,
    "folder": _folder,
    "list": _list,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}


def _store() -> Store:
    """Where training keeps its copies too."""
    return Store(Path(DataConfig.cache) / "shards", DataConfig.cache_gigabytes)
