"""Full-vocabulary token statistics for the selector, from the student and a teacher inside the trainer.

Shape letters: R rows, L response length, K top-k, H hidden size, V vocabulary rows of a shard.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from slime.backends.megatron_utils import distributed, forward, packing
from slime.backends.megatron_utils.losses.exact_stats import exact_stats
from slime.backends.megatron_utils.packing import MicroBatch
from slime.backends.megatron_utils.step import Stepper, share_rows

# name in the result -> attribute of ExactStats
PER_TOKEN = {
    "H": "H",
    "KLf": "KLf",
    "KLr": "KLr",
    "C": "C",
    "student_log_probs": "student_logp_R",
    "teacher_log_probs": "teacher_logp_R",
}
PER_CANDIDATE = {
    "student_topk_ids": "student_ids_RK",
    "student_topk_logprobs": "student_logps_RK",
    "teacher_topk_ids": "teacher_ids_RK",
    "teacher_topk_logprobs": "teacher_logps_RK",
    "teacher_at_student_ids": "teacher_at_student_RK",
}
FIELDS = ("teacher_log_probs", *PER_CANDIDATE)  # those that are train data too
HELD_BYTES = 4 * 2**30


def exact_metrics(stepper: Stepper, data: dict, k: int, teacher_vocab_size: int, teacher_row_bytes: int) -> dict[str, list[np.ndarray]]:
    """Statistics of every response token of this rank's samples (collective), the same on all ranks of a replica.

    teacher_row_bytes: of one of the teacher's hidden states; at most HELD_BYTES of them wait for the student at a time.
    Returns one array a sample under each name: H (entropy of the student, nats), KLf = KL(teacher || student), KLr, C
    (teacher's mass on the student's top-K), student_log_probs, teacher_log_probs: float32 [L]; *_topk_ids int32 [L, K]
    (-1 beyond the vocabulary), *_topk_logprobs and teacher_at_student_ids float32 [L, K].
    """
    lengths = data["response_lengths"]
    batches = stepper.pack(data, list(range(len(lengths))), packing.every_row)

    def head(batch: MicroBatch, hidden_RH: Tensor, weight_VH: Tensor) -> tuple[Tensor, dict]:
        stats = exact_stats(
            hidden_RH,
            weight_VH,
            batch.fields["teacher_hidden_RH"],
            batch.fields["teacher_weight_VH"],
            k=k,
            tp_group=mpu.get_tensor_model_parallel_group(),
            vocab_size=stepper.args.vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            temperature=getattr(stepper.args, "rollout_temperature", None) or 1.0,
            target_R=batch.fields["target"],
        )
        return torch.zeros((), device=hidden_RH.device), {"batch": batch, "stats": stats}

    kept = []
    for group in _groups(batches, teacher_row_bytes):
        for batch, fields in zip(group, stepper.teacher(group), strict=True):
            batch.fields.update(fields)
        with forward.evaluating(stepper.model):
            kept += forward.run(stepper.model, group, head, forward_only=True)
        for batch in group:
            batch.fields.clear()
    out: dict[str, list[np.ndarray]] = {}
    for name, attribute in {**PER_TOKEN, **PER_CANDIDATE}.items():
        width = k if name in PER_CANDIDATE else 0
        triples = [(x["batch"].sample, x["batch"].response_position, getattr(x["stats"], attribute)) for x in kept]
        values = share_rows(forward.scatter_rows(triples, lengths, stepper.device, width), lengths, stepper.device, width)
        out[name] = [v.astype(np.int32) if name.endswith("_ids") and name != "teacher_at_student_ids" else v for v in values]
    return out


def _groups(batches: list[MicroBatch], row_bytes: int) -> list[list[MicroBatch]]:
    """Runs of micro-batches whose rows take about HELD_BYTES, as many on every rank (collective)."""
    wanted = -(-sum(batch.num_rows for batch in batches) * row_bytes // HELD_BYTES)
    number = min(max(distributed.max_over_ranks(wanted), 1), len(batches))
    bounds = [len(batches) * i // number for i in range(number + 1)]
    return [batches[a:b] for a, b in itertools.pairwise(bounds)]
