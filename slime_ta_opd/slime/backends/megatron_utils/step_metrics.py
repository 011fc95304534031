"""What a step logs: sums over rows and ranks, joined once a step, and the numbers made of them.

Shape letters: R rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from slime.backends.megatron_utils import distributed
from slime.backends.megatron_utils.packing import MicroBatch

_GAP = "train_rollout_logprob_abs_diff"


@dataclass
class StepSums:
    """Sums of one step. totals: name -> (sum, number of rows); counts: name -> sum; peaks: name -> maximum.

    objective: the loss (a sum of factor x row loss). denominator: its named count. bad_samples: ids whose loss is not finite.
    """

    totals: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    objective: float = 0.0
    denominator: dict[str, float] = field(default_factory=dict)
    bad_samples: set[int] = field(default_factory=set)

    @classmethod
    def collect(cls, kept: list[dict], batches: list[MicroBatch], data: dict, denominator: dict, whole: bool) -> StepSums:
        """Sums over this rank's micro-batches, then over all ranks (collective): the same on every rank.

        kept: what `Stepper` kept of each micro-batch on the last stage. whole: the rows are all valid positions.
        """
        own = cls()
        if mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0:
            own.denominator = dict(denominator)
            own.counts["tokens"] = float(sum(b.num_tokens for b in batches))
            own.counts["rows"] = float(sum(b.num_rows for b in batches))
            own.counts["micro_batches"] = float(len(batches)) if mpu.get_context_parallel_rank() == 0 else 0.0
            for keep in kept:
                own._add(keep, data, whole)
        joined = cls()
        for part in distributed.gather_objects(own):
            joined._merge(part)
        return joined

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.objective)) and not self.bad_samples

    def _add(self, keep: dict, data: dict, whole: bool) -> None:
        batch: MicroBatch = keep["batch"]
        n = batch.num_grad
        self.objective += float(keep["total"])
        bad = ~keep["loss"].isfinite()
        if bool(bad.any()):
            names = data.get("sample_indices") or range(len(data["tokens"]))
            self.bad_samples |= {int(names[s]) for s in batch.sample[:n][bad].unique().tolist()}
        is_kept = batch.fields["opd_weights"][:n] != 0
        for name, values in _with_sampled_kl(keep["stats"], batch, slice(0, n)):
            self._mean(f"{name}_kept", values[is_kept])
            if whole:
                self._mean(f"{name}_valid", values)
        for name, values in _with_sampled_kl(keep.get("other", {}), batch, slice(n, None)):
            self._mean(f"{name}_valid", values)
        if "student_logp" in keep["stats"] and "rollout_log_probs" in batch.fields and n:
            moved = (keep["stats"]["student_logp"] - batch.fields["rollout_log_probs"][:n]).double()
            self._mean(_GAP, moved.abs())
            self._peak(f"{_GAP}_max", moved.abs())
            self._mean("importance_ratio_mean", moved.exp())  # current weights over those that sampled
            self._peak("importance_ratio_max", moved.exp())

    def _mean(self, name: str, values: Tensor) -> None:
        total, number = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = (total + float(values.double().sum()), number + values.numel())

    def _peak(self, name: str, values: Tensor) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), float(values.max()))

    def _merge(self, other: StepSums) -> None:
        for name, (total, number) in other.totals.items():
            mine = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (mine[0] + total, mine[1] + number)
        for name, value in other.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value
        for name, value in other.peaks.items():
            self.peaks[name] = max(self.peaks.get(name, value), value)
        self.objective += other.objective
        self.bad_samples |= other.bad_samples
        self.denominator.update(other.denominator)


def _with_sampled_kl(stats: dict[str, Tensor], batch: MicroBatch, part: slice) -> Iterator[tuple[str, Tensor]]:
    """The loss's statistics, and log p_student - log p_teacher of the sampled token where both are known."""
    yield from stats.items()
    if "student_logp" in stats and "teacher_log_probs" in batch.fields and "reverse_kl_sampled" not in stats:
        yield "reverse_kl_sampled", stats["student_logp"] - batch.fields["teacher_log_probs"][part]


def step_metrics(sums: StepSums, step: dict, grad_norm: float, lr: float, seconds: float, loss_name: str) -> dict[str, float]:
    """What one step logs; a name says over which rows a mean is taken (kept or valid)."""
    metrics = {
        "loss": sums.objective,
        "grad_norm": grad_norm,
        "lr": lr,
        **{name: float(step[name]) for name in ("kept_tokens", "kept_count", "valid_tokens", "num_samples") if name in step},
        "step_seconds": seconds,
        **{f"denominator_{name}": value for name, value in sums.denominator.items()},
        **sums.counts,
        **{name: total / number for name, (total, number) in sums.totals.items() if number},
        **sums.peaks,
    }
    for rows in ("kept", "valid"):
        value = metrics.get(f"divergence_{rows}") if "reverse_kl" in loss_name else None
        value = metrics.get(f"reverse_kl_sampled_{rows}") if value is None else value
        if value is not None:
            metrics[f"reverse_kl_{rows}"] = value
    metrics["tokens_per_second"] = metrics.get("tokens", 0.0) / max(seconds, 1e-9)
    return metrics


def average_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps of a rollout; what adds up is summed, maxima stay maxima."""
    added = {"tokens", "rows", "micro_batches", "step_seconds", "steps_skipped"}
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in steps:
        for name, value in metrics.items():
            values[name].append(value)
    return {
        name: float(sum(v)) if name in added else max(v) if name.endswith("_max") else float(np.mean(v))
        for name, v in values.items()
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """GiB of the fullest rank: the allocator's peak since the last call and what is held now; on CPU the process (collective)."""
    if device.type == "cuda":
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = held = psutil.Process().memory_info().rss
    return {"peak_memory_gib": distributed.max_over_ranks(peak) / 2**30, "memory_gib": distributed.max_over_ranks(held) / 2**30}
