"""Writing one table as parquet, csv or jsonl, and whole files only: a temporary name, fsync, then a rename."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ta_opd.errors import ConfigError
from ta_opd.token_bank import jsonio

FORMATS = ("parquet", "csv", "jsonl")
BATCH_ROWS = 65_536


def check_format(name: str) -> str:
    """`name` if it is a known format, else ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"token bank format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return name


def temporary_path(path: Path) -> Path:
    """The hidden name that `path` has while it is written; no reader's pattern matches it."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed, on an error it is removed."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _sync_directory(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # not every file system lets a directory be opened
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


class TableSink:
    """Appends record batches to one file of the given format. Close it, or use it as a context manager."""

    def __init__(self, path: Path, kind: str, schema: pa.Schema, metadata: dict[bytes, bytes] | None = None):
        check_format(kind)
        self._write: Callable[[pa.Table], None]
        if kind == "parquet":
            schema = schema.with_metadata({**(schema.metadata or {}), **(metadata or {})})
            text = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_dictionary(f.type)]
            small = [f.name for f in schema if pa.types.is_int8(f.type)]
            self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=[*text, *small])
            self._write = self._write_parquet
        elif kind == "csv":
            self._file = open(path, "wb")
            self._header = True
            self._writer = self._file
            self._write = self._write_csv
        else:
            self._writer = open(path, "wb")
            self._write = self._write_jsonl
        self._schema = schema

    def __enter__(self) -> "TableSink":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, table: pa.Table) -> None:
        self._write(table)

    def close(self) -> None:
        self._writer.close()

    def _write_parquet(self, table: pa.Table) -> None:
        self._writer.write_table(table.cast(self._schema), row_group_size=2 * BATCH_ROWS)

    def _write_csv(self, table: pa.Table) -> None:
        table = plain(table)
        quoted = any(_needs_quotes(column) for column in table.columns)
        options = pa.csv.WriteOptions(include_header=self._header, quoting_style="needed" if quoted else "none")
        pa.csv.write_csv(table, self._writer, options)
        self._header = False

    def _write_jsonl(self, table: pa.Table) -> None:
        for batch in plain(table).to_batches(max_chunksize=2048):
            lines = [jsonio.dumps(row) for row in batch.to_pylist()]
            if lines:
                self._writer.write(b"\n".join(lines) + b"\n")


def plain(table: pa.Table) -> pa.Table:
    """The table as csv and jsonl hold it: text as plain strings, list columns as JSON arrays ("" where null)."""
    for position, field in enumerate(table.schema):
        column = table.column(position)
        if pa.types.is_dictionary(field.type):
            table = table.set_column(position, field.name, column.cast(pa.string()))
        elif pa.types.is_list(field.type):
            table = table.set_column(position, field.name, json_arrays(column))
    return table


def json_arrays(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A list column as JSON text, "" where null."""
    return pa.chunked_array([_json_chunk(chunk) for chunk in column.chunks], type=pa.string())


def _json_chunk(chunk: pa.ListArray) -> pa.Array:
    if chunk.null_count == len(chunk):
        return pa.array([""] * len(chunk), pa.string())
    lengths = chunk.value_lengths().to_numpy(zero_copy_only=False)
    width = lengths[0]
    if chunk.null_count == 0 and width and (lengths == width).all():
        block = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, int(width))
        if np.isfinite(block).all():
            return pa.array(jsonio.dump_rows(block), pa.string())
    return pa.array(["" if row is None else jsonio.dumps(row).decode() for row in chunk.to_pylist()], pa.string())


def _needs_quotes(column: pa.ChunkedArray) -> bool:
    if not pa.types.is_string(column.type) or len(column) == 0:
        return False
    distinct = pc.unique(column)
    return bool(pc.any(pc.match_substring_regex(distinct, r'[",\r\n]')).as_py())
