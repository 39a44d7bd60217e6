"""Images named in a file: .txt with a path a line, .csv with a header, .jsonl with an object a line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from vae.data.names import Names
from vae.data.sources import Files
from vae.errors import InputError

COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path")  # looked for where none is named


def list_source(path: str | Path, column: str | None, key: str = "data.root") -> Files:
    """The images of a list, in its order; relative paths are below the folder of the list."""
    file = Path(path).expanduser()
    given = f"{key}={str(path)!r}"
    if not file.is_file():
        raise InputError(f"{given}: no such file; name a .txt, .csv or .jsonl list of images")
    try:
        table = _read(file, given)
    except pa.ArrowInvalid as error:
        raise InputError(f"{given}: not readable as {file.suffix} ({str(error).splitlines()[0]})") from error
    names = table.column(_column(table.column_names, column, given))
    if not (pa.types.is_string(names.type) or pa.types.is_large_string(names.type) or pa.types.is_binary(names.type)):
        raise InputError(f"{given}: column {column or names._name!r} holds {names.type}, expected paths")
    names = Names(names.cast(pa.large_binary()).drop_null())
    if not names:
        raise InputError(f"{given}: no line in it; put one path on each")
    _check_first(file.parent, names, given)
    return Files(file.parent, names)


def _read(file: Path, given: str) -> pa.Table:
    if file.suffix == ".txt":
        plain = pyarrow.csv.ParseOptions(delimiter="\x01", quote_char=False)
        named = pyarrow.csv.ReadOptions(column_names=["path"])
        kinds = pyarrow.csv.ConvertOptions(column_types={"path": pa.binary()})
        return pyarrow.csv.read_csv(file, named, plain, kinds)
    if file.suffix == ".csv":
        return pyarrow.csv.read_csv(file, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    if file.suffix == ".jsonl":
        return pyarrow.json.read_json(file)
    raise InputError(f"{given}: an unknown kind of list, expected .txt, .csv or .jsonl")


def _column(columns: list[str], wanted: str | None, given: str) -> str:
    found = [name for name in ([wanted] if wanted else COLUMNS) if name in columns]
    if not found:
        looked = repr(wanted) if wanted else f"any of {', '.join(COLUMNS)}"
        raise InputError(f"{given}: its columns are {', '.join(columns)}; looked for {looked}: name one by data.column")
    return found[0]


def _check_first(folder: Path, names: Names, given: str) -> None:
    first = folder / names[0]
    if not first.exists():
        raise InputError(f"{given}: its first image {first} is not there; relative paths are below the list's folder")
