"""One optimizer step: rows, micro-batches, forward and backward, one number for the loss, and what is logged.

Shape letters: R rows, H hidden size, V vocabulary, L response length, N samples of this rank.

Losses are divided by counts of the whole step over all ranks (`losses.reduction`), so the objective is a plain sum over
rows, micro-batches and ranks, and every layout gives the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from slime.backends.megatron_utils import distributed, forward, packing
from slime.backends.megatron_utils.balancing import set_step_tokens
from slime.backends.megatron_utils.hf_config import ModelShape
from slime.backends.megatron_utils.losses.reduction import row_factors
from slime.backends.megatron_utils.losses.registry import LossSpec, get_loss
from slime.backends.megatron_utils.losses.types import Rows
from slime.backends.megatron_utils.model import unwrap
from slime.backends.megatron_utils.packing import MicroBatch
from slime.backends.megatron_utils.settings import Settings
from slime.backends.megatron_utils.step_metrics import StepSums
from slime.utils.fields import FIELDS, LOGGED

EXTRA_ROW_FIELDS = {"advantages": "advantage_R", "student_log_probs_old": "student_logp_old_R"}
ROW_OF = {f.name: f.row for f in FIELDS if f.row} | EXTRA_ROW_FIELDS


@dataclass
class Stepper:
    """What stays the same from step to step: the model, the loss, the settings and the device."""

    model: object
    loss: LossSpec
    settings: Settings
    args: argparse.Namespace
    device: torch.device
    log_valid: bool = False
    teacher: Callable[[list[MicroBatch]], list[dict[str, Tensor]]] | None = None
    field_names: list[str] = field(default_factory=list)

    def __post_init__(self):
        needed = self.loss.needs_for(self.args)
        self.field_names = [name for name, row in ROW_OF.items() if row in needed]
        self.field_names += [n for n in ("opd_weights", "advantages", *LOGGED) if n not in self.field_names]

    def pack(self, data: dict, indices: list[int], choose) -> list[MicroBatch]:
        """Micro-batches of these samples, as many on every rank."""
        return packing.pack(
            data,
            indices,
            choose,
            max_tokens=self.settings.max_tokens_per_gpu,
            parallel=replace(forward.parallel(), sequence_parallel=self.settings.sequence_parallel),
            field_names=self.field_names,
            agree=distributed.max_over_ranks,
            device=self.device,
            last_layer=self.settings.opd_last_layer_rows,
        )

    def gradients(self, data: dict, step: dict) -> StepSums:
        """Adds the step's gradient to the model's buffers; returns the sums over all ranks that metrics are made of."""
        settings = self.settings
        batches = self.pack(
            data, step["indices"], lambda d, i: packing.choose_rows(d, i, settings.opd_loss_rows, self.log_valid)
        )
        kept_per_sample = torch.tensor([float(w.sum(dtype=np.float64)) for w in data["opd_weights"]], device=self.device)
        if self.teacher is not None and self.loss.teacher == "hidden":
            for batch, fields in zip(batches, self.teacher(batches), strict=True):
                batch.fields.update(fields)
        set_step_tokens(unwrap(self.model).decoder.layers, batches)
        denominator: dict[str, float] = {}

        def head(batch: MicroBatch, hidden_RH: Tensor, weight_VH: Tensor) -> tuple[Tensor, dict]:
            n = batch.num_grad
            rows = self._rows(batch, slice(0, n))
            reduction = row_factors(
                settings.opd_loss_reduction,
                rows.weight_R,
                kept_tokens=step["kept_tokens"],
                valid_tokens=step["valid_tokens"],
                num_samples=step["num_samples"],
                sample_R=rows.sample_R,
                kept_per_sample_N=kept_per_sample,
            )
            denominator[reduction.denominator_name] = reduction.denominator
            rows.factor_R = reduction.factor_R.to(torch.float32)
            group = mpu.get_tensor_model_parallel_group()
            result = self.loss(hidden_RH[:n], weight_VH, rows, self.args, group)
            keep = {"total": result.total.detach(), "loss": result.loss_R.detach(), "stats": result.stats, "batch": batch}
            if batch.num_rows > n:
                with torch.no_grad():
                    other = self._rows(batch, slice(n, None))
                    keep["other"] = self.loss(hidden_RH[n:].detach(), weight_VH.detach(), other, self.args, group).stats
            return result.total, keep

        kept = forward.run(self.model, batches, head, forward_only=False)
        return StepSums.collect(kept, batches, data, denominator, whole=self.log_valid or settings.opd_loss_rows == "all")

    def _rows(self, batch: MicroBatch, part: slice) -> Rows:
        rows = Rows(target_R=batch.fields["target"][part], sample_R=batch.sample[part])
        for name, value in batch.fields.items():
            row = ROW_OF.get(name, name)
            if row == "teacher_weight_VH":
                rows.teacher_weight_VH = value
            elif row.endswith(("_R", "_RK", "_RH")):
                setattr(rows, row, value[part])
        if "student_log_probs_old" in batch.fields:
            rows.student_logp_old_R = batch.fields["student_log_probs_old"][part]
        return rows

    def log_probs(self, data: dict) -> list[np.ndarray]:
        """Log-prob of every response token under the current weights: float32 [L] a sample, on every rank of a replica."""
        loss = get_loss("sampled_reverse_kl")
        lengths = data["response_lengths"]
        batches = self.pack(data, list(range(len(lengths))), packing.every_row)

        def head(batch: MicroBatch, hidden_RH: Tensor, weight_VH: Tensor) -> tuple[Tensor, dict]:
            target = batch.fields["target"]
            zero = torch.zeros(target.shape, device=target.device)
            rows = Rows(target_R=target, student_logp_old_R=zero, teacher_logp_R=zero)
            stats = self.loss_stats(loss, hidden_RH, weight_VH, rows)
            return zero.sum(), {"batch": batch, "logp": stats.get("student_logp", zero)}

        with forward.evaluating(self.model):
            kept = forward.run(self.model, batches, head, forward_only=True)
        triples = [(k["batch"].sample, k["batch"].response_position, k["logp"]) for k in kept]
        return share_rows(forward.scatter_rows(triples, lengths, self.device), lengths, self.device)

    def loss_stats(self, loss: LossSpec, hidden_RH: Tensor, weight_VH: Tensor, rows: Rows) -> dict[str, Tensor]:
        with torch.no_grad():
            return loss(hidden_RH, weight_VH, rows, self.args, mpu.get_tensor_model_parallel_group()).stats


def share_rows(values: list[Tensor], lengths: list[int], device: torch.device, width: int = 0) -> list[np.ndarray]:
    """Per-response values that the last stage's context-parallel ranks hold in parts (zero elsewhere) -> whole, on all
    ranks of the replica: one float32 array [L] or [L, width] a sample."""
    shape = (width,) if width else ()
    flat = torch.cat([torch.zeros((0, *shape), dtype=torch.float64, device=device), *values]).contiguous()
    if mpu.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(flat, group=mpu.get_context_parallel_group())
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        last = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(flat, src=last, group=mpu.get_pipeline_model_parallel_group())
    return [x.astype(np.float32) for x in np.split(flat.cpu().numpy(), np.cumsum(lengths)[:-1])] if lengths else []


def now(device: torch.device) -> float:
    """Wall clock after all queued work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def vocabulary_args(args: argparse.Namespace, model, teacher: ModelShape | None = None) -> argparse.Namespace:
    """Arguments as the losses read them: with true vocabulary sizes, whatever padding the models hold."""
    sizes = {"vocab_size": unwrap(model).shape.vocab_size, "teacher_vocab_size": teacher and teacher.vocab_size}
    return argparse.Namespace(**{**vars(args), **sizes})
