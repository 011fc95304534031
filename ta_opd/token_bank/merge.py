"""merge_banks: many bank files into one, in a stream: no more than a batch of rows is in memory."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ta_opd.errors import DataError
from ta_opd.token_bank.columns import BY_NAME, RAW_TOPK
from ta_opd.token_bank.files import BATCH_ROWS, TableSink, atomic_path, json_arrays
from ta_opd.token_bank.reader import bank_files, column_names, file_kind, is_bank_file, stream_raw, to_type

NUMERIC_PREFIXES = ("H", "D", "KL", "C", "mean_", "student_", "teacher_", "sampled_", "target_", "budget_", "loss_")
SOURCE_COLUMNS = ("source_file", "source_dir")


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote: counts of files, rows and columns; valid and kept tokens (0 without those columns)."""

    files: int
    rows: int
    columns: int
    output: Path
    valid_tokens: int
    kept_tokens: int

    @property
    def keep_ratio(self) -> float:
        return self.kept_tokens / self.valid_tokens if self.valid_tokens else 0.0


class NoInputError(DataError, FileNotFoundError):
    """The inputs of a merge name no bank file."""


def find_inputs(inputs: Iterable[str | Path], output: str | Path | None = None) -> list[Path]:
    """Files named by directories (their `bank_files`), glob patterns or paths, each once by its resolved path.

    A pattern such as DIR/* takes no summary, config or merged file; one that spells the file name out takes that file.
    `output` itself is never among them. Raises NoInputError (a FileNotFoundError) when nothing is left.
    """
    inputs = [str(item) for item in inputs]
    own = Path(output).resolve() if output is not None else None
    files: dict[Path, Path] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            matches = bank_files(path)
        elif path.is_file():
            matches = [path]
        else:
            matches = []
            for match in sorted(map(Path, glob.glob(item))):
                if match.is_dir():
                    matches += bank_files(match)
                elif not any(mark in path.name for mark in "*?[") or is_bank_file(match):
                    matches.append(match)
        for match in matches:
            if match.resolve() != own:
                files.setdefault(match.resolve(), match)
    if not files:
        raise NoInputError(
            f"nothing to merge in {', '.join(inputs) or 'no input'}: expected directories with rollout_*.csv, "
            "rollout_*.jsonl or *.parquet, or such files"
        )
    return list(files.values())


def merge_banks(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    drop_raw_topk: bool = False,
    source_columns: bool = True,
    batch_rows: int = BATCH_ROWS,
) -> MergeReport:
    """Concatenate bank files into `output` (.parquet, .csv or .jsonl by suffix), which appears whole or not at all.

    Columns are the union in order of first sight. The bank's own columns get their types; other columns whose name
    starts like a number's (NUMERIC_PREFIXES) become numbers where at least one value is one. source_file and source_dir
    say where a row comes from (an input that has them keeps its own). Running it again gives the same output: neither
    the output nor another merged file in an input directory is read.
    Raises NoInputError, DataError on unreadable files or an unknown suffix.
    """
    output = Path(output)
    kind = file_kind(output)
    files = find_inputs(inputs, output)
    for path in files:
        file_kind(path)
    schema = _merged_schema(files, kind, drop_raw_topk, source_columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = valid = kept = 0
    with atomic_path(output) as temporary:
        with TableSink(temporary, kind, schema, {b"ta_opd.merged": str(len(files)).encode()}) as sink:
            for path in files:
                for table in stream_raw(path, batch_rows=batch_rows):
                    table = _fit(table, schema, path)
                    sink.write(table)
                    rows += len(table)
                    valid += _count(table, "loss_mask_original")
                    kept += _count(table, "budget_keep")
    return MergeReport(len(files), rows, len(schema), output, valid, kept)


def _merged_schema(files: Sequence[Path], kind: str, drop_raw_topk: bool, source_columns: bool) -> pa.Schema:
    stored: dict[str, set] = {}  # column -> Arrow types it is stored in
    unknown: set[str] = set()
    for path in files:
        names = column_names(path)
        candidates = [name for name in names if name not in BY_NAME]
        textual = file_kind(path) != "parquet"
        scan = candidates if textual else []
        for name in names:
            stored.setdefault(name, set())
        for table in stream_raw(path) if file_kind(path) == "jsonl" else stream_raw(path, scan) if scan else ():
            for name in table.column_names:
                stored.setdefault(name, set())
                if name not in BY_NAME:
                    unknown.add(name)
                    stored[name].add(_guess(name, table.column(name)))
        if not textual:
            for field in pq.read_schema(path):
                stored[field.name].add(field.type)
                if field.name not in BY_NAME:
                    unknown.add(field.name)
    fields = []
    for name, types in stored.items():
        if name in RAW_TOPK and drop_raw_topk or name in SOURCE_COLUMNS and source_columns:
            continue
        fields.append(pa.field(name, _common(types) if name in unknown else _known_type(name, types, files, kind)))
    if source_columns:
        fields += [pa.field(name, BY_NAME["pair_id"].type) for name in SOURCE_COLUMNS]
    return pa.schema(fields)


def _known_type(name: str, types: set, files: Sequence[Path], kind: str) -> pa.DataType:
    column = BY_NAME[name]
    if column.is_list:  # lists stay lists only if every input has them so
        lists = kind == "parquet" and all(file_kind(path) == "parquet" for path in files)
        return column.type if lists and all(pa.types.is_list(t) or pa.types.is_null(t) for t in types) else pa.string()
    return column.type


def _guess(name: str, column: pa.ChunkedArray) -> pa.DataType:
    """Type of an unknown text column in one batch: a number if its name allows it and at least one value is one."""
    if pa.types.is_null(column.type) or column.null_count == len(column):
        return pa.null()
    if not pa.types.is_string(column.type):
        return column.type
    numeric = name.startswith(NUMERIC_PREFIXES)
    if numeric and to_type(column, pa.float64()).null_count < len(column):
        return pa.float64()
    return pa.string()


def _common(types: set) -> pa.DataType:
    types = {t.value_type if pa.types.is_dictionary(t) else t for t in types if not pa.types.is_null(t)}
    if not types:
        return pa.string()
    if len(types) == 1:
        return next(iter(types))
    if pa.float64() in types or all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in types):
        return pa.float64()
    return pa.string()


def _fit(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    columns = []
    for field in schema:
        if field.name in table.column_names:
            column = table.column(field.name)
            if pa.types.is_list(column.type) and pa.types.is_string(field.type):
                column = json_arrays(column)
            columns.append(to_type(column, field.type, f"{path}: column {field.name}"))
        elif field.name in SOURCE_COLUMNS:
            value = path.name if field.name == "source_file" else str(path.parent)
            zeros = pa.array(np.zeros(len(table), np.int32))
            columns.append(pa.DictionaryArray.from_arrays(zeros, pa.array([value])))
        else:
            columns.append(pa.nulls(len(table), field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _count(table: pa.Table, name: str) -> int:
    if name not in table.column_names:
        return 0
    return int(pc.sum(pc.greater(table.column(name), 0)).as_py() or 0)
