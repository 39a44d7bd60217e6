"""Parquet tables with a column of images, as the hub holds them: made into tar archives, which are read in place."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vae.data.store import from_remote
from vae.errors import InputError

ROWS = 64  # read at a time


def rows_in(url: str) -> tuple[int, str]:
    """(how many, a mark of their sizes) from the end of the file alone."""

    def rows(stream: Any) -> tuple[int, str]:
        try:
            about = pq.ParquetFile(stream).metadata
            sizes = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
            return about.num_rows, xxhash.xxh3_64_hexdigest(repr(sizes).encode())
        except pa.ArrowInvalid as error:
            raise _damaged(url, error) from error

    return from_remote(url, rows)


def table_to_tar(table: Path, archive: Path, column: str | None = None) -> None:
    """One member a row, called by its number; a row without an image becomes an empty file, which is no image."""
    is_there = False
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, data in enumerate(_images(table, column)):
            add_member(tar, f"{number:08d}.jpg", data)
            is_there |= bool(data)
    if not is_there:
        raise InputError(f"{table}: no images in its rows, or only paths of some; write the table with embedded images")


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file that is the same bytes whoever writes it and whenever."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def image_column(schema: Any, wanted: str | None, given: str) -> str:
    """The column of bytes, or of a struct with a field `bytes`, as `datasets` writes images."""
    structs, others = [], []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            structs.append(field.name)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            others.append(field.name)
    if wanted is not None and wanted in structs + others:
        return wanted
    found = structs or others
    if wanted is None and len(found) == 1:
        return found[0]
    told = f"{wanted!r} is no column of images" if wanted is not None else f"{len(found)} columns of images"
    raise InputError(f"{given}: {told}, its columns are {', '.join(schema.names)}; name one by data.column")


def _images(table: Path, wanted: str | None) -> Iterator[bytes]:
    try:
        file = pq.ParquetFile(table)
        column = image_column(file.schema_arrow, wanted, str(table))
        for batch in file.iter_batches(ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield (value if isinstance(value, bytes) else (value or {}).get("bytes")) or b""
    except (pa.ArrowException, OSError) as error:
        raise _damaged(str(table), error) from error


def _damaged(table: str, error: Exception) -> InputError:
    return InputError(f"{table}: not readable as parquet ({' '.join(str(error).split())[:200]}); replace it")
