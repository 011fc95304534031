"""Reading banks: any file as a stream of Arrow tables of known types, and a whole bank as one pandas table."""

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ta_opd.errors import DataError
from ta_opd.token_bank import jsonio
from ta_opd.token_bank.columns import BY_NAME, RAW_TOPK
from ta_opd.token_bank.files import BATCH_ROWS, FORMATS

JSONL_ROWS = 4096


def file_kind(path: Path) -> str:
    """parquet, csv or jsonl by suffix; DataError on another one."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise DataError(f"{path}: expected a .parquet, .csv or .jsonl file, got suffix {path.suffix!r}")
    return kind


def bank_files(directory: Path) -> list[Path]:
    """The files of a bank directory: rollout_*.csv, then rollout_*.jsonl, then *.parquet, each in order of the rollout.

    Outputs of the merge tool (merged.*, any parquet file with its mark, a rollout_* file with its columns) are not part of a bank. A rollout
    that is there in several formats counts once.
    """
    found = []
    for pattern in ("rollout_*.csv", "rollout_*.jsonl", "*.parquet"):
        found += sorted(directory.glob(pattern), key=lambda path: (len(path.name), path.name))
    files, stems = [], set()
    for path in found:
        if path.stem in stems or not is_bank_file(path):
            continue
        stems.add(path.stem)
        files.append(path)
    return files


def is_bank_file(path: Path) -> bool:
    """Whether a file holds rows of a bank: not its summary or config, not a hidden or a merged file."""
    if path.name.startswith(".") or path.suffix.lstrip(".") not in FORMATS or path.stem in ("merged", "summary"):
        return False
    if path.suffix == ".parquet":
        return b"ta_opd.merged" not in (_open_parquet(path).schema_arrow.metadata or {})
    # text has no mark: a merge into a file that is called like a rollout is known by its columns
    return not path.stem.startswith("rollout_") or "source_file" not in column_names(path)


def column_names(path: Path) -> list[str]:
    """Column names of one file in order (of a jsonl file: the keys of its first row)."""
    kind = file_kind(path)
    if kind == "parquet":
        return _open_parquet(path).schema_arrow.names
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if kind == "csv":
                return next(csv.reader(file), [])
            first = file.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error})") from error
    return list(_json_row(first, path)) if first.strip() else []


def stream_raw(path: Path, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The file as tables of at most about `batch_rows` rows, columns as stored: csv cells all text, empty cells null.

    Raises DataError on a file that cannot be parsed.
    """
    kind = file_kind(path)
    if kind == "parquet":
        present = set(_open_parquet(path).schema_arrow.names)
        wanted = None if columns is None else [name for name in columns if name in present]
        for batch in _open_parquet(path).iter_batches(batch_rows, columns=wanted):
            yield pa.Table.from_batches([batch])
    elif kind == "csv":
        yield from _stream_csv(path, columns)
    else:
        yield from _stream_jsonl(path, columns, min(batch_rows, JSONL_ROWS))


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _stream_csv(path: Path, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    header = column_names(path)
    if not header:
        return
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
        include_columns=None if columns is None else [name for name in columns if name in header],
    )
    read = pa.csv.ReadOptions(block_size=4 << 20)
    try:
        with pa.csv.open_csv(path, convert_options=convert, read_options=read) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable csv file ({error})") from error


def _stream_jsonl(path: Path, columns: Sequence[str] | None, batch_rows: int) -> Iterator[pa.Table]:
    with open(path, "rb") as file:
        while lines := list(islice(file, batch_rows)):
            rows = [_json_row(line, path) for line in lines if line.strip()]
            names = dict.fromkeys(name for row in rows for name in row) if columns is None else columns
            yield pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_row(line: bytes | str, path: Path) -> dict:
    try:
        row = jsonio.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: not a readable jsonl file ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: expected one JSON object a line, got {type(row).__name__}")
    return row


def _json_column(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers and "" in one column: as text
        return pa.array([None if value is None or value == "" else str(value) for value in values], pa.string())


def to_type(column: pa.ChunkedArray, kind: pa.DataType, what: str = "column") -> pa.ChunkedArray:
    """A stored column as `kind`; text that is no number becomes null, whole numbers written as 3.0 become integers.

    Raises DataError (naming `what`) on values that `kind` cannot hold.
    """
    if column.type == kind:
        return column
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
        if column.type == kind:
            return column
    if pa.types.is_dictionary(kind):
        return to_type(column, pa.string(), what).dictionary_encode()
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if numeric and pa.types.is_string(column.type):
        column = _parse_numbers(column)
    if pa.types.is_integer(kind) and pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"{what}: expected {kind} values ({error})") from error


def _parse_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        values = pd.to_numeric(column.to_pandas(), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        return pa.chunked_array([pa.array(values, from_pandas=True)])


def stream_typed(path: Path, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """As `stream_raw`, with the bank's own columns in their types (text as strings, raw top-k as stored)."""
    for table in stream_raw(path, columns, batch_rows):
        for position, name in enumerate(table.column_names):
            known = BY_NAME.get(name)
            if known is None or known.is_list:
                continue
            column = to_type(table.column(position), known.read_type, f"{path}: column {name}")
            if known.is_text:
                column = pc.fill_null(column, "")  # csv cannot tell an empty text from none
            table = table.set_column(position, name, column)
        yield table


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One bank file as one Arrow table; raw top-k columns as lists. Missing columns of `columns` come as nulls."""
    path = Path(path)
    parts = [_lists(table) for table in stream_typed(path, columns)]
    table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})
    if columns is None:
        return table
    for name in columns:
        if name not in table.column_names:
            kind = BY_NAME[name].read_type if name in BY_NAME else pa.float64()
            table = table.append_column(name, pa.nulls(len(table), kind))
    return table.select(list(columns))


def _lists(table: pa.Table) -> pa.Table:
    for name in RAW_TOPK:
        if name in table.column_names:
            position = table.column_names.index(name)
            column, kind = table.column(position), BY_NAME[name].type
            if pa.types.is_string(column.type):
                rows = [jsonio.loads(text) if text else None for text in column.to_pylist()]
                column = pa.chunked_array([pa.array(rows, kind)])
            table = table.set_column(position, name, to_type(column, kind))
    return table


def read_bank(source: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A whole bank (its directory, or one csv, jsonl or parquet file) as one table, rollouts in order.

    Banks of the released code (csv, jsonl) and ours read alike: numbers as numbers ("none" is NaN), text as strings,
    raw top-k as arrays or None. columns: only these (missing ones are NaN). Raises DataError when there is nothing to
    read.
    """
    source = Path(source)
    if source.is_file():
        files = [source]
    elif source.is_dir():
        files = bank_files(source) or sorted(source.glob("merged.*"))[:1]
    else:
        raise DataError(f"token bank {source}: no such file or directory")
    if not files:
        raise DataError(f"token bank {source}: no rollout_*.csv, rollout_*.jsonl or *.parquet file in it")
    table = pa.concat_tables([read_table(path, columns) for path in files], promote_options="permissive")
    wide = [pa.field(f.name, pa.int32() if pa.types.is_int8(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(wide)).to_pandas()  # int8 columns would overflow in a user's arithmetic
