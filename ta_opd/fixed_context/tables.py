"""Reading and writing the diagnostic's tables: parquet, CSV or JSON lines by suffix, with a small record of how a table was made.

The record (`meta`) is what a later step checks before it joins or compares two tables: which bank, teacher, tokenizer and K.
It travels inside a parquet file, and beside a CSV or JSONL file as `<name>.meta.json`.
"""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ta_opd.errors import DataError
from ta_opd.token_bank import jsonio

META_KEY = b"ta_opd"
SUFFIXES = (".parquet", ".csv", ".jsonl")
# Columns that are text whatever is in them: a label 007 is no 7, a prompt NA is not missing. Formats without types need to be told.
TEXT = ("source_file", "status", "prompt", "response", "label", "prompt_id")
_MISSING = ("", "nan", "NaN", "-nan", "NA", "N/A", "<NA>", "null", "NULL", "None")


def read_table(path, columns: list[str] | None = None) -> pd.DataFrame:
    """The table at `path`, all columns or those named.

    Raises DataError when the file is missing, cut off, of another format, has no row, or lacks a column asked for.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise DataError(f"table {path}: no such file; expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            frame = pq.read_table(path, columns=columns).to_pandas()
        elif path.suffix == ".csv":
            frame = _read_csv(path)
        else:
            frame = _read_json_lines(path)
    except (pa.ArrowException, OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(
            f"table {path}: cannot be read as {path.suffix[1:]} ({_first_line(error)}); "
            "is it cut off? Write it again, or delete it so that the step runs anew"
        ) from error
    if columns is not None:
        missing = [name for name in columns if name not in frame.columns]
        if missing:
            raise DataError(f"table {path}: expected columns {', '.join(missing)}, which it does not have")
        frame = frame[columns]
    if len(frame) == 0:
        raise DataError(f"table {path}: expected at least one row, got none")
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    columns = pd.read_csv(path, nrows=0).columns
    missing = {name: [""] if name in TEXT else list(_MISSING) for name in columns}
    kinds = {name: str for name in columns if name in TEXT}
    return pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=missing)


def _read_json_lines(path: Path) -> pd.DataFrame:
    """Values as they are written: no text becomes a number. A column without any value becomes NaN."""
    with open(path, "rb") as file:
        rows = [jsonio.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected one object a line")
    frame = pd.DataFrame(rows)
    empty = [name for name in frame if name not in TEXT and frame[name].isna().all()]
    return frame.astype(dict.fromkeys(empty, float))


def write_table(path, frame: pd.DataFrame, meta: dict | None = None) -> Path:
    """Writes `frame` to `path` in the format of its suffix, whole or not at all, with `meta` (JSON-able) kept as its record."""
    path = Path(path)
    _check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if meta is not None:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), META_KEY: json.dumps(meta).encode()})
        pq.write_table(table, partial, compression="zstd")
    elif path.suffix == ".csv":
        frame.to_csv(partial, index=False)
    else:
        with open(partial, "wb") as file:  # every digit of a float: DataFrame.to_json keeps ten decimals
            file.writelines(jsonio.dumps(row) + b"\n" for row in frame.astype(object).where(frame.notna(), None).to_dict("records"))
    if meta is not None and path.suffix != ".parquet":
        _sidecar(path).write_text(json.dumps(meta, indent=1) + "\n")
    partial.replace(path)
    return path


def read_meta(path) -> dict:
    """How the table at `path` was made; empty when it carries no record. Raises DataError when the file cannot be read."""
    path = Path(path)
    if path.suffix != ".parquet":
        sidecar = _sidecar(path)
        return json.loads(sidecar.read_text()) if sidecar.is_file() else {}
    try:
        raw = (pq.read_schema(path).metadata or {}).get(META_KEY)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"table {path}: cannot be read as parquet ({_first_line(error)}); is it cut off?") from error
    return json.loads(raw) if raw else {}


def write_json(path, content) -> Path:
    """Writes `content` as indented JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    partial.replace(path)
    return path


def to_markdown(frame: pd.DataFrame, digits: int = 4) -> str:
    """A Markdown table; floats with `digits` significant digits, missing values empty."""
    rows = [[_cell(value, digits) for value in row] for row in frame.itertuples(index=False)]
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _cell(value, digits: int) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.{digits}g}"
    return "" if value is None else " ".join(str(value).splitlines()).replace("|", "\\|")


def _plain(value):
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise DataError(f"table {path}: expected a name ending in {', '.join(SUFFIXES)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
