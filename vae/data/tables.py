"""Parquet tables with a column of images, as the hub holds them: made into tar archives, which are read in place."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vae.data.store import open_remote
from vae.errors import InputError

ROWS = 64  # read at a time


def rows_in(url: str) -> int:
    """From the end of the file alone."""
    with open_remote(url) as stream:
        return pq.ParquetFile(stream).metadata.num_rows


def table_to_tar(table: Path, archive: Path) -> None:
    """One member a row, called by its number; a row without an image becomes an empty file, which is no image."""
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, data in enumerate(_images(table)):
            add_member(tar, f"{number:08d}.jpg", data)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file that is the same bytes whoever writes it and whenever."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _images(table: Path) -> Iterator[bytes]:
    file = pq.ParquetFile(table)
    column = image_column(file.schema_arrow, str(table))
    for batch in file.iter_batches(ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield (value if isinstance(value, bytes) else (value or {}).get("bytes")) or b""


def image_column(schema: Any, given: str) -> str:
    """The first column of bytes, or of a struct with a field `bytes`, as `datasets` writes images."""
    import pyarrow as pa

    for field in schema:
        kind = field.type
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return field.name
    raise InputError(f"{given}: no column of images, its columns are {', '.join(schema.names)}")
