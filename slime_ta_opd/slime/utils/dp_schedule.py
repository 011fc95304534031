"""Splitting one rollout batch over data-parallel ranks: whole optimizer steps, balanced by tokens.

The denominators of every loss reduction are computed here, once, over the whole batch, so that they are the same numbers
at every layout.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from slime.utils import fields
from ta_opd.errors import DataError


def split_for_data_parallel(data: dict[str, Any], dp_size: int, global_batch_size: int) -> list[dict[str, Any]]:
    """One dict a rank: the manifest's lists for its samples, and `steps`.

    A step is {"indices": local sample indices, "kept_tokens": sum of weights, "kept_count": positions with weight > 0,
    "valid_tokens", "num_samples", "num_samples_kept"}, all but the indices over the whole global batch.
    """
    lengths = [len(t) for t in data["tokens"]]
    total = len(lengths)
    if total % global_batch_size:
        raise DataError(f"rollout: expected a multiple of the global batch size {global_batch_size}, got {total} samples")
    owned: list[list[int]] = [[] for _ in range(dp_size)]
    steps: list[list[dict[str, Any]]] = [[] for _ in range(dp_size)]
    for begin in range(0, total, global_batch_size):
        indices = range(begin, begin + global_batch_size)
        counts = _counts(data, indices)
        for rank, part in enumerate(balance([lengths[i] for i in indices], dp_size)):
            local = list(range(len(owned[rank]), len(owned[rank]) + len(part)))
            owned[rank].extend(begin + i for i in part)
            steps[rank].append({"indices": local, **counts})
    return [{**fields.take(data, owned[r]), "steps": steps[r]} for r in range(dp_size)]


def balance(lengths: list[int], parts: int) -> list[list[int]]:
    """Indices in `parts` lists of nearly equal token sums (longest first to the lightest part), each sorted."""
    heap = [(0, p) for p in range(parts)]
    out: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, p = heapq.heappop(heap)
        out[p].append(i)
        heapq.heappush(heap, (load + lengths[i], p))
    return [sorted(p) for p in out]


def _counts(data: dict[str, Any], indices: range) -> dict[str, float | int]:
    weights = [data["opd_weights"][i] for i in indices]
    return {
        "kept_tokens": float(sum(w.sum(dtype=np.float64) for w in weights)),
        "kept_count": int(sum(np.count_nonzero(w) for w in weights)),
        "valid_tokens": int(sum(data["loss_masks"][i].sum() for i in indices)),
        "num_samples": len(indices),
        "num_samples_kept": int(sum(bool(np.any(w)) for w in weights)),
    }
