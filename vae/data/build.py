"""The sources of a run: training and validation images, which never meet, or all the images that somebody names.

`open_sources` opens what a DataConfig describes, and holds out a share for validation where no validation images are
named. `open_whole` opens what a command line names, undivided.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vae.config.data import DataConfig
from vae.data.hub import SAVED, hub_shards, hub_source
from vae.data.remote import SCHEME, Store, expand
from vae.data.shards import INDEX, Shards, open_shards
from vae.data.sources import (
    TRAINING_PHOTOS,
    VALIDATION_PHOTOS,
    Files,
    Names,
    Part,
    Photos,
    Source,
    fewest_by_hash,
    folder_source,
    in_words,
    list_source,
    split_by_hash,
)
from vae.errors import InputError, require

Pair = tuple[Source, Source]  # training, validation
MOST_OPEN = 512  # shards
SIDES = ("train", ("val", "valid", "validation"))  # names of subfolders for training and validation


def open_sources(config: "DataConfig") -> Pair:
    """Open the (training, validation) images of a data configuration.

    At most `validation_images` are used for validation, chosen by the hashes of their names.
    """
    training, validation = SOURCES[config.source](config)

    limit = config.validation_images
    if limit is None or len(validation) <= limit:
        return training, validation
    return training, _part(validation, fewest_by_hash(_names(validation), limit))


def _photos(_: "DataConfig") -> Pair:
    """Open the photographs of scikit-image."""
    return Photos(TRAINING_PHOTOS), Photos(VALIDATION_PHOTOS)


def _folder(config: "DataConfig") -> Pair:
    """Open a folder of images.

    Validation is `validation_root`; or a subfolder "val", "valid" or "validation" beside one called "train"; or a share
    of the images.
    """
    assert config.root is not None
    root = Path(config.root).expanduser()
    if config.validation_root is not None:
        validation = Path(config.validation_root).expanduser()
        one, other = root.resolve(), validation.resolve()
        if one in other.parents or other in one.parents:
            wrong = f"data.validation_root={config.validation_root!r} and data.root={config.root!r}: one in the other"
            raise InputError(f"{wrong}, so that images would be in both; name folders beside each other")
        return folder_source(root), folder_source(validation, key="data.validation_root")

    held_out = [root / name for name in SIDES[1] if (root / name).is_dir()]

    if not (root / SIDES[0]).is_dir() or not held_out:
        return _divided(folder_source(config.root), config)

    if len(held_out) > 1:
        names = " and ".join(folder.name for folder in held_out)
        raise InputError(f"data.root={config.root!r}: it has {SIDES[0]}, {names}; name one by data.validation_root")
    return folder_source(root / SIDES[0]), folder_source(held_out[0])


def _list(config: "DataConfig") -> Pair:
    """Open a list of images. Validation is another list, or a share of the images."""
    assert config.root is not None
    training = list_source(config.root, config.column)
    if config.validation_root is not None:
        validation = list_source(config.validation_root, config.column, key="data.validation_root")
        return _apart(training, validation, config)

    return _divided(training, config)


def _apart(training: Files, validation: Files, config: "DataConfig") -> Pair:
    """Return both sources. Raise InputError where two lists of one folder share some images.

    The same list twice is allowed here, because an evaluation may give it. Training refuses it.
    """
    shared = np.isin(_names(validation).hashes(), _names(training).hashes())
    if training.root.resolve() == validation.root.resolve() and shared.any() and not shared.all():
        first = validation.names[int(np.argmax(shared))]
        wrong = f"{shared.sum()} images of data.validation_root={config.validation_root!r} are in data.root too"
        raise InputError(f"{wrong}, the first: {first!a}; take them out of one of the lists")
    return training, validation


def _huggingface(config: "DataConfig") -> Pair:
    """Open a data set of `datasets`.

    Validation is another split, or a share: of the shards with `streaming`, else of the images.
    """
    assert config.root is not None
    if config.streaming:
        training = _opened(config, hub_shards(config.root, config.split))
        if config.validation_split is None:
            return _sharded(training, config)
        return training, _opened(config, hub_shards(config.root, config.validation_split))

    training = hub_source(config.root, config.split, config.column)
    if config.validation_split is not None:
        return training, hub_source(
            config.root, config.validation_split, config.column, split_key="data.validation_split"
        )
    return _divided(training, config)


def _webdataset(config: "DataConfig") -> Pair:
    """Open shards. Validation is other shards, or a share of them."""
    assert config.root is not None
    training = _opened(config, expand(config.root, "data.root"))
    if config.validation_root is not None:
        return training, _opened(config, expand(config.validation_root, "data.validation_root"))
    return _sharded(training, config)


SOURCES: dict[str, Callable[["DataConfig"], Pair]] = {
    "photos": _photos,
    "folder": _folder,
    "list": _list,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}


def _opened(config: "DataConfig", urls: list[str]) -> Shards:
    """Open the shards at `urls`. Those used last are kept open."""
    store = Store(Path(config.cache) / "shards", config.cache_gigabytes)
    at_once = MOST_OPEN if config.bucket_resolutions else config.open_shards  # buckets read shards in any order
    return open_shards(urls, store, _warn, config.column, at_once)


def _warn(line: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {line}", file=sys.stderr)


def _divided(source: Source, config: "DataConfig") -> Pair:
    """Divide a source into training and validation images, by the hashes of their names."""
    training, validation = split_by_hash(_names(source), config.validation_fraction, config.validation_at_least)
    return _part(source, training), _part(source, validation)


def _sharded(source: Shards, config: "DataConfig") -> Pair:
    """Divide a source into training and validation by whole shards.

    So what is held out is never among what training reads.
    """
    training, validation = split_by_hash(Names([shard.title for shard in source.found]), config.validation_fraction)
    if not len(training) and config.validation_fraction < 1:
        other = "data.validation_split" if config.streaming else "data.validation_root"
        raise InputError(f"data.root={config.root!r}: a single shard cannot be divided; name another by {other}")

    return source.part(training.tolist()), source.part(validation.tolist())


def _names(source: Source) -> Names:
    """Return the names of a source as `Names`, which can be hashed at once."""
    return source.names if isinstance(source.names, Names) else Names(source.names)


def _part(source: Source, indices: np.ndarray) -> Source:
    """Return the images of a source at `indices`."""
    if isinstance(source, Files) and isinstance(source.names, Names):
        part = Files(source.root, source.names.take(indices), source.passed_over)
        return part if len(indices) < len(source) else source
    return Part(source, indices)


LISTS = (".txt", ".csv", ".jsonl")
TABLES = (".parquet", ".arrow")
ARCHIVE = ".tar"
KEY = "SRC"  # what errors call the source
ON_THE_COMMAND_LINE = {"data.column": "--column", "data.split": "--split", "data.streaming=true": "--streaming"}


@dataclass(frozen=True)
class Named:
    """Images as somebody named them: `root`, and `kind`, one of data.source, or None where the name tells.

    `note` is called with a sentence for each damaged archive. Such archives are used as far as they go.
    """

    root: str
    note: Callable[[str], None]
    kind: str | None = None
    split: str = "train"
    column: str | None = None
    streaming: bool = False


def open_whole(named: Named) -> Source:
    """Open all the images that are named, undivided.

    Raises InputError where an option does not apply to the kind of source, and where there are no images.
    """
    kind = named.kind or kind_of(named.root)
    require(kind in WHOLE, f"--source {kind}", f"one of {sorted(WHOLE)}")

    hub = kind == "huggingface"
    require(hub or not named.streaming, "--streaming", "it with --source huggingface only")
    require(hub or named.split == Named.split, f"--split {named.split}", "it with --source huggingface only")
    require(hub or kind == "list" or named.column is None, f"--column {named.column}", "it with huggingface or list")

    # Errors below name configuration keys; here people know options of the command line.
    try:
        return WHOLE[kind](named)
    except InputError as error:
        spoken = re.sub("|".join(map(re.escape, ON_THE_COMMAND_LINE)), lambda m: ON_THE_COMMAND_LINE[m[0]], str(error))
        raise InputError(spoken) from error


def kind_of(root: str) -> str:
    """Return the kind of source that `root` is, by its name alone, or by what lies in it where it is a folder.

    Raises InputError where the name does not tell.
    """
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


def _whole_photos(_: Named) -> Source:
    """Open all photographs of scikit-image."""
    return Photos(sorted(TRAINING_PHOTOS + VALIDATION_PHOTOS))


def _whole_folder(named: Named) -> Source:
    """Open a folder."""
    found = folder_source(named.root, KEY)
    if found.passed_over:
        named.note(in_words(found.passed_over, found.root))
    return found


def _whole_list(named: Named) -> Source:
    """Open a list."""
    return list_source(named.root, named.column, KEY)


def _whole_huggingface(named: Named) -> Source:
    """Open one split of a data set, shard by shard with `streaming`."""
    if named.streaming:
        return open_shards(hub_shards(named.root, named.split, KEY), _store(), named.note, named.column)
    return hub_source(named.root, named.split, named.column, KEY)


def _whole_webdataset(named: Named) -> Source:
    """Open shards: those of a folder, or those that a pattern means."""
    folder = Path(named.root).expanduser()
    pattern = str(folder / f"*{ARCHIVE}") if folder.is_dir() else named.root
    return open_shards(expand(pattern, KEY), _store(), named.note)


WHOLE: dict[str, Callable[[Named], Source]] = {
    "photos": _whole_photos,
    "folder": _whole_folder,
    "list": _whole_list,
    "huggingface": _whole_huggingface,
    "webdataset": _whole_webdataset,
}


def _store() -> Store:
    """Return the store where training keeps its copies too."""
    return Store(Path(DataConfig.cache) / "shards", DataConfig.cache_gigabytes)
