"""Reads a prompt file (JSONL or parquet) into checked rows. Every complaint names the file and the line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ta_opd.errors import DataError

_MISSING = object()


@dataclass(frozen=True)
class PromptRow:
    """One prompt as it stands in the file. where: "file line 7", for messages."""

    prompt: str | list[dict[str, str]]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def read_prompt_file(
    path: str | Path,
    *,
    input_key: str,
    label_key: str | None = None,
    metadata_key: str | None = None,
    teacher_key: str | None = None,
    teachers: tuple[str, ...] = (),
) -> tuple[list[PromptRow], str]:
    """All rows of the file and a fingerprint (sha256) of its bytes.

    A key may be dotted ("reward_model.ground_truth"). With more than one name in `teachers`, each row must name one of them
    under `teacher_key`; the name is kept as metadata["teacher"]. Raises DataError where the file is missing, of another form
    or empty, where a line is not a JSON object, lacks a key, or holds a prompt that is neither text nor chat messages.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"prompt file {path}: expected a JSONL or parquet file, found {'a directory' if path.is_dir() else 'nothing'}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = []
    for where, row in _raw_rows(path):
        prompt = _check_prompt(_lookup(row, input_key, "--input-key", where), input_key, where)
        label = None
        if label_key:
            value = _lookup(row, label_key, "--label-key", where)
            label = value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
        metadata = row.get(metadata_key) if metadata_key else None
        if metadata is not None and not isinstance(metadata, dict):
            raise DataError(f"{where}: expected an object under {metadata_key!r}, got {type(metadata).__name__}")
        metadata = dict(metadata or {})
        if len(teachers) > 1:
            name = _lookup(row, teacher_key, "--teacher-key", where)
            if name not in teachers:
                raise DataError(f"{where}: unknown teacher {name!r}; --teacher gives {', '.join(teachers)}")
            metadata["teacher"] = name
        rows.append(PromptRow(prompt, label, metadata, where))
    if not rows:
        raise DataError(f"prompt file {path}: expected at least one prompt, got none")
    return rows, digest


def _raw_rows(path: Path) -> Iterator[tuple[str, dict]]:
    if path.suffix in (".parquet", ".pq"):
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except (OSError, ValueError) as error:
            raise DataError(f"prompt file {path}: not a readable parquet file: {error}") from error
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # the byte order mark that some editors write
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{where}: expected one JSON object, got {_shorten(line)} ({error}){_hint(path, line)}") from error
            if not isinstance(row, dict):
                hint = "; a list of objects becomes JSONL when each stands on a line of its own" if isinstance(row, list) else ""
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}{hint}")
            yield where, row


def _hint(path: Path, line: bytes) -> str:
    """What to do about a line that is not JSON, where its file tells."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return "; save the file as UTF-8"
    if path.suffix in (".csv", ".tsv"):
        return "; tables in CSV are not read: write them as parquet or JSONL"
    if line.strip() in (b"[", b"{"):
        return "; the file is one JSON value over many lines: write one object a line"
    return ""


def _shorten(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _lookup(row: dict, key: str, flag: str, where: str) -> Any:
    value = row.get(key, _MISSING)
    if value is _MISSING and "." in key:
        value = row
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:
        raise DataError(f"{where}: no key {key!r} ({flag}); the keys there are {', '.join(map(str, row)) or 'none'}")
    return value


def _check_prompt(prompt: Any, key: str, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{where}: the prompt under {key!r} is empty")
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") and "content" in m for m in prompt):
        return prompt
    raise DataError(
        f"{where}: expected text or a list of messages with role and content under {key!r}, got {str(prompt)[:60]!r}"
    )
