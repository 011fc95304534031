"""What a rollout is logged as: means over all valid tokens and over kept tokens, side by side, so that methods compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slime.utils.types import Sample


def rollout_metrics(samples: Sequence[Sample], selection: dict[str, Any] | None) -> dict[str, float]:
    """Per-rollout numbers under `rollout/`. `selection` is what the token selection reported, None without one.

    reverse_kl_* is the mean of the sampled-token estimate log p_student - log p_teacher in nats a token (unbiased under
    the student's own samples); *_valid over every valid position, *_kept over positions with a weight.
    """
    lengths = np.array([s.response_length for s in samples])
    valid = np.concatenate([s.valid_mask() for s in samples]) if len(samples) else np.zeros(0, bool)
    out = {
        "rollout/samples": float(len(samples)),
        "rollout/response_length": float(lengths.mean()) if len(lengths) else 0.0,
        "rollout/response_length_max": float(lengths.max()) if len(lengths) else 0.0,
        "rollout/truncated": float(np.mean([s.truncated for s in samples])) if len(lengths) else 0.0,
        "rollout/valid_tokens": float(valid.sum()),
    }
    answered = [s for s in samples if s.response_length > 0]  # the others carry nothing
    weights = [s.opd_weights for s in answered]
    if any(w is None for w in weights):
        kept = valid
    else:
        kept = valid & (np.concatenate([np.zeros(0), *weights]) > 0)
    out["rollout/kept_tokens"] = float(kept.sum())
    out["rollout/keep_ratio"] = float(kept.sum() / max(valid.sum(), 1))
    student = [s.rollout_log_probs for s in answered]
    teacher = [s.teacher_log_probs for s in answered]
    if answered and all(x is not None for x in student):
        s = np.concatenate(student)
        out["rollout/student_log_prob"] = _mean(s, valid)
        if all(x is not None for x in teacher):
            t = np.concatenate(teacher)
            out["rollout/teacher_log_prob"] = _mean(t, valid)
            out["rollout/reverse_kl_valid"] = _mean(s - t, valid)
            out["rollout/reverse_kl_kept"] = _mean(s - t, kept)
    for key, value in (selection or {}).items():
        if isinstance(value, (bool, int, float, np.integer, np.floating)) and f"rollout/{key}" not in out:
            out[f"rollout/{key}"] = float(value)
    by_teacher: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        name = sample.metadata.get("teacher")
        if isinstance(name, str) and name:  # a data set may keep something else under that key where there is one teacher
            by_teacher.setdefault(name, []).append(i)
    for name, rows in by_teacher.items():
        part = rollout_metrics_pair(samples, rows)
        out |= {f"teacher/{name}/{key}": value for key, value in part.items()}
    return out


def rollout_metrics_pair(samples: Sequence[Sample], rows: Sequence[int]) -> dict[str, float]:
    """Sample count, reverse KL and, after a selection, share of valid tokens kept, of the given samples (one of several teachers)."""
    pairs = [(samples[i].rollout_log_probs, samples[i].teacher_log_probs, samples[i].valid_mask()) for i in rows]
    known = [(s - t)[v] for s, t, v in pairs if s is not None and t is not None]
    flat = np.concatenate(known) if known else np.zeros(0)
    found = {"samples": float(len(rows)), "reverse_kl_valid": _mean(flat, np.ones(len(flat), bool))}
    answered = [samples[i] for i in rows if samples[i].response_length > 0]
    if answered and all(s.opd_weights is not None for s in answered):
        valid = sum(int(s.valid_mask().sum()) for s in answered)
        found["keep_ratio"] = sum(int((s.valid_mask() & (s.opd_weights > 0)).sum()) for s in answered) / max(valid, 1)
    return found


def staleness(samples: Sequence[Sample]) -> dict[str, float]:
    """Training steps between the weights that sampled a token and those that train on it: mean over tokens, and largest.

    Step r trains weights of version r, so a token of version v in rollout r is r - v old. Nothing where versions are not known.
    """
    known = [(s.rollout_id - int(v), n) for s in samples if s.rollout_id is not None for v, n in s.weight_versions if v.isdecimal()]
    total = sum(n for _, n in known)
    if not total:
        return {}
    return {"rollout/staleness": sum(age * n for age, n in known) / total, "rollout/staleness_max": float(max(age for age, _ in known))}


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    chosen = values[where & np.isfinite(values)]
    return float(chosen.mean()) if len(chosen) else float("nan")
