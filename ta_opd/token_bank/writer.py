"""TokenBankWriter: one file a rollout, keyed by the true rollout id, written by a thread beside the training step."""

import atexit
import csv
import io
import logging
import queue
import re
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ta_opd.errors import DataError, ServiceError
from ta_opd.token_bank import jsonio
from ta_opd.token_bank.columns import QUADRANTS, SCHEMA_VERSION, build_table, check_columns
from ta_opd.token_bank.files import FORMATS, TableSink, atomic_path, check_format, write_bytes_atomic
from ta_opd.token_bank.reader import read_table

logger = logging.getLogger(__name__)

SUMMARY_MEANS = ("H_norm", "D_norm", "C_norm", "tip_score", "ca_softor_score", "reach_t1")
SUMMARY_COLUMNS = (
    "rollout_id", "num_tokens", "num_valid_tokens", "num_kept_tokens", "keep_ratio",
    *(f"mean_{name}" for name in SUMMARY_MEANS), "q3_tokens", "budget_method", "budget_ratio",
)  # fmt: skip
_SUMMARY_INPUT = ("loss_mask_original", "budget_keep", "quadrant", "budget_method", "budget_ratio", *SUMMARY_MEANS)
_ROLLOUT_FILE = re.compile(rf"rollout_(\d{{6,}})\.({'|'.join(FORMATS)})")
_STOP = object()


def rollout_path(directory: Path, rollout_id: int, kind: str) -> Path:
    return directory / f"rollout_{rollout_id:06d}.{kind}"


def rollout_files(directory: Path) -> dict[int, Path]:
    """{rollout id: file} of the rollout files in a bank directory, in order of the id."""
    found = ((_ROLLOUT_FILE.fullmatch(path.name), path) for path in directory.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


class TokenBankWriter:
    """Writes `rollout_<6-digit rollout id>.<format>`, `summary.csv` and `config.json` into one directory.

    `write` checks the columns, hands them to a thread and returns; at most `queue_size` rollouts wait, then `write`
    blocks. Writing a rollout id again (a resumed run) replaces its file and its summary row. Every file appears by a
    rename after it was synced to disk, so a crash at any moment leaves whole files only; what a crash left half-done in
    the summary is repaired at the next start. One writer a directory at a time. config: every option that shaped the
    bank, kept in config.json; when it differs from the one found there, the older one moves to the list "earlier", with
    the rollout ids that existed then.

    Raises ServiceError from the next `write`, `flush` or `close` when the thread failed.
    """

    def __init__(
        self,
        directory: str | Path,
        format: str = "parquet",
        config: Mapping | None = None,
        raw_topk: bool = False,
        *,
        queue_size: int = 2,
    ):
        self.format = check_format(format)
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.raw_topk = raw_topk
        self._error: BaseException | None = None
        self._closed = False
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self._config = jsonio.dumps({"schema_version": SCHEMA_VERSION, **(config or {})})
        self._write_config()
        self._summary = self._load_summary()
        self._queue: queue.Queue = queue.Queue(maxsize=queue_size)
        self._thread = threading.Thread(target=self._run, name="token-bank-writer", daemon=True)
        self._thread.start()
        _OPEN_WRITERS.add(self)

    def __enter__(self) -> "TokenBankWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, rollout_id: int, columns: Mapping[str, object]) -> Path:
        """Queue one rollout; returns the path that its file will have.

        columns: as in `columns.build_table` (the arrays must not be changed afterwards); rollout_id and schema_version
        are filled in. Raises DataError on columns that do not fit, ServiceError when an earlier rollout could not be
        written.
        """
        self._raise_pending()
        if self._closed:
            raise ServiceError(f"token bank {self.directory} is closed; open a new TokenBankWriter")
        if rollout_id < 0:
            raise DataError(f"token bank: rollout id must be >= 0, got {rollout_id}")
        columns = {**columns, "schema_version": SCHEMA_VERSION, "rollout_id": int(rollout_id)}
        check_columns(columns)
        self._queue.put((int(rollout_id), columns))
        return rollout_path(self.directory, rollout_id, self.format)

    def flush(self) -> None:
        """Wait until everything queued is on disk."""
        self._queue.join()
        self._raise_pending()

    def close(self) -> None:
        """Write what is queued, stop the thread. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._queue.put(_STOP)
            self._thread.join()
            _OPEN_WRITERS.discard(self)
        self._raise_pending()

    def _raise_pending(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise ServiceError(
                f"token bank {self.directory}: a rollout was not written: {type(error).__name__}: {error}. "
                "Files written before are whole; free the disk or mend the path, and resume."
            ) from error

    def _run(self) -> None:
        while True:
            job = self._queue.get()
            try:
                if job is _STOP:
                    return
                self._write_rollout(*job)
            except BaseException as error:  # kept for the caller's thread
                self._error = self._error or error
            finally:
                del job
                self._queue.task_done()

    def _write_rollout(self, rollout_id: int, columns: Mapping[str, object]) -> None:
        table = build_table(columns, raw_topk=self.raw_topk)
        path = rollout_path(self.directory, rollout_id, self.format)
        with atomic_path(path) as temporary:
            with TableSink(temporary, self.format, table.schema, {b"ta_opd.config": self._config}) as sink:
                sink.write(table)
        for other in FORMATS:  # the same rollout from a run that wrote another format would be counted twice
            if other != self.format:
                rollout_path(self.directory, rollout_id, other).unlink(missing_ok=True)
        self._summary[rollout_id] = summary_row(rollout_id, table)
        self._write_summary()

    def _write_config(self) -> None:
        path = self.directory / "config.json"
        config = jsonio.loads(self._config)
        earlier = []
        if path.exists():
            try:
                old = jsonio.loads(path.read_bytes())
            except ValueError:
                old = {}
            earlier = old.pop("earlier", [])
            if old and old != config:
                earlier.append({**old, "rollout_ids": list(rollout_files(self.directory))})
        write_bytes_atomic(path, jsonio.dumps({**config, "earlier": earlier}, indent=True))

    def _load_summary(self) -> dict[int, dict]:
        """Rows of summary.csv by rollout id, the last of doubled ones; rows of newer files are made anew."""
        path = self.directory / "summary.csv"
        rows: dict[int, dict] = {}
        written = 0
        if path.exists():
            written = path.stat().st_mtime_ns
            with open(path, newline="") as file:
                rows = {int(row["rollout_id"]): row for row in csv.DictReader(file) if row.get("rollout_id")}
        stale = [
            (rollout_id, file)
            for rollout_id, file in rollout_files(self.directory).items()
            if rollout_id not in rows or file.stat().st_mtime_ns > written
        ]
        self._summary = rows
        for rollout_id, file in stale:
            rows[rollout_id] = summary_row(rollout_id, read_table(file, _SUMMARY_INPUT))
        if stale:
            self._write_summary()
        return rows

    def _write_summary(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, SUMMARY_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._summary[key] for key in sorted(self._summary))
        write_bytes_atomic(self.directory / "summary.csv", text.getvalue().encode())


def summary_row(rollout_id: int, table: pa.Table) -> dict[str, object]:
    """The row of summary.csv for one rollout's table: counts, and means over its valid positions."""
    valid_T = _numpy(table, "loss_mask_original") > 0
    keep_T = _numpy(table, "budget_keep") > 0
    row: dict[str, object] = {"rollout_id": rollout_id, "num_tokens": len(valid_T)}
    row["num_valid_tokens"], row["num_kept_tokens"] = int(valid_T.sum()), int(keep_T.sum())
    row["keep_ratio"] = float(keep_T.sum() / max(valid_T.sum(), 1))
    for name in SUMMARY_MEANS:
        values = _numpy(table, name)[valid_T]
        values = values[np.isfinite(values)]
        row[f"mean_{name}"] = float(values.mean()) if len(values) else 0.0
    in_q3_T = pc.equal(table.column("quadrant").cast(pa.string()), QUADRANTS[2]).fill_null(False)
    row["q3_tokens"] = int((in_q3_T.to_numpy() & valid_T).sum())
    for name in ("budget_method", "budget_ratio"):
        first = table.column(name).drop_null().slice(0, 1).to_pylist()
        row[name] = first[0] if first else ""
    return row


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    return pc.fill_null(table.column(name).cast(pa.float64()), np.nan).to_numpy()


_OPEN_WRITERS: "weakref.WeakSet[TokenBankWriter]" = weakref.WeakSet()


@atexit.register
def _close_open_writers() -> None:
    for writer in list(_OPEN_WRITERS):
        try:
            writer.close()
        except ServiceError as error:
            logger.error("%s", error)
