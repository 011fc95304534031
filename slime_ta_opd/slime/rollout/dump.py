"""Rollouts on disk: one parquet file a rollout, one row a response, list columns; nothing in it can run code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from slime.utils.types import Sample
from ta_opd.errors import ConfigError

_F, _I = pa.list_(pa.float32()), pa.list_(pa.int32())
SCHEMA = pa.schema(
    [("rollout_id", pa.int64()), ("sample_index", pa.int64()), ("group_index", pa.int64()), ("status", pa.string()),
     ("prompt", pa.string()), ("response", pa.string()), ("label", pa.string()), ("prompt_length", pa.int64()),
     ("response_length", pa.int64()), ("tokens", _I), ("loss_mask", pa.list_(pa.int8())), ("rollout_log_probs", _F),
     ("teacher_log_probs", _F), ("opd_weights", _F), ("weight_versions", pa.list_(pa.string())), ("weight_version_tokens", _I)]
)  # fmt: skip


def dump_path(path: str, rollout_id: int) -> Path:
    """`path` with {rollout_id} filled in; a directory gets rollout_%06d.parquet, slime's `.pt` becomes `.parquet`.

    Raises ConfigError where the path asks for anything else, or where a file would hold the last rollout only.
    """
    try:
        target = Path(path.format(rollout_id=rollout_id))
    except (KeyError, IndexError, ValueError):
        raise ConfigError(f"--save-debug-rollout-data: expected a path with nothing in braces but {{rollout_id}}, got {path!r}") from None
    if target.suffix not in (".parquet", ".pt"):
        return target / f"rollout_{rollout_id:06d}.parquet"
    if str(target) == path:
        raise ConfigError(f"--save-debug-rollout-data: expected {{rollout_id}} in the name of a file, got {path!r}; each rollout would replace the last")
    return target.with_suffix(".parquet")


def dump_rollout(path: str, rollout_id: int, samples: Sequence[Sample]) -> Path:
    """Writes the file that `dump_path` names, whole or not at all."""
    target = dump_path(path, rollout_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "rollout_id": rollout_id,
            "sample_index": s.index,
            "group_index": s.group_index,
            "status": s.status.value,
            "prompt": s.prompt if isinstance(s.prompt, str) else orjson.dumps(s.prompt).decode(),
            "response": s.response,
            "label": None if s.label is None else str(s.label),
            "prompt_length": s.prompt_length,
            "response_length": s.response_length,
            "tokens": list(s.tokens),
            "loss_mask": s.valid_mask().astype("int8").tolist(),
            "rollout_log_probs": _floats(s.rollout_log_probs),
            "teacher_log_probs": _floats(s.teacher_log_probs),
            "opd_weights": _floats(s.opd_weights),
            "weight_versions": [version for version, _ in s.weight_versions],
            "weight_version_tokens": [count for _, count in s.weight_versions],
        }
        for s in samples
    ]
    partial = target.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    partial.replace(target)
    return target


def _floats(values):
    return None if values is None else [float(v) for v in values]
