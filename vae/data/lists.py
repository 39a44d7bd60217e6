"""Images named in a file: .txt with a path a line, .csv with a header, .jsonl with an object a line."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from vae.data.names import Names
from vae.data.sources import Files
from vae.errors import InputError

COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path")  # looked for where none is named
BLOCK = 1 << 24  # bytes read at a time; no line may be longer


def list_source(path: str | Path, column: str | None, key: str = "data.root") -> Files:
    """The images of a list, in its order; relative paths are below the folder of the list."""
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
    if column is not None:
        raise InputError(f"data.column={column!r}: {given} has no columns; leave it out")
    parsing = pyarrow.csv.ParseOptions(delimiter="\x01", quote_char=False)
    return _of_table(file, "path", pyarrow.csv.ReadOptions(column_names=["path"], block_size=BLOCK), parsing)


def _of_csv(file: Path, column: str | None, given: str) -> Names:
    header = next(csv.reader(io.StringIO(_start(file).decode("utf-8-sig", "surrogateescape"), newline="")), [])
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return _of_table(file, _column(header, column, given), pyarrow.csv.ReadOptions(block_size=BLOCK), parsing)


def _of_objects(file: Path, column: str | None, given: str) -> Names:
    first = json.loads(_start(file).lstrip().partition(b"\n")[0].decode("utf-8-sig", "surrogateescape") or "{}")
    name = _column(first if isinstance(first, dict) else [], column, given)
    parsing = pyarrow.json.ParseOptions(pa.schema({name: pa.large_binary()}), unexpected_field_behavior="ignore")
    reading = pyarrow.json.ReadOptions(block_size=BLOCK)
    return Names(pyarrow.json.read_json(file, reading, parsing).column(name).drop_null())


KINDS: dict[str, Callable[[Path, str | None, str], Names]] = {".txt": _of_text, ".csv": _of_csv, ".jsonl": _of_objects}


def _of_table(file: Path, column: str, reading: pyarrow.csv.ReadOptions, parsing: pyarrow.csv.ParseOptions) -> Names:
    """One column alone, as bytes: nothing has to be UTF-8, and the types of others are not guessed."""
    kinds = pyarrow.csv.ConvertOptions(
        include_columns=[column], column_types={column: pa.large_binary()}, null_values=[""], strings_can_be_null=True
    )
    return Names(pyarrow.csv.read_csv(file, reading, parsing, kinds).column(column).drop_null())


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(BLOCK)


def _column(columns: Iterable[str], wanted: str | None, given: str) -> str:
    columns = list(columns)
    found = [name for name in ([wanted] if wanted else COLUMNS) if name in columns]
    if not found:
        looked = repr(wanted) if wanted else f"any of {', '.join(COLUMNS)}"
        shown = ascii(columns)[:200]
        raise InputError(f"{given}: its columns are {shown}; looked for {looked}: name one by data.column")
    return found[0]


def _check_first(folder: Path, names: Names, given: str) -> None:
    try:
        is_there = (folder / names[0]).exists()
    except OSError:  # a name longer than any
        is_there = False
    if not is_there:
        first = ascii(str(folder / names[0]))[:300]
        raise InputError(f"{given}: its first image {first} is not there; relative paths are below the list's folder")
