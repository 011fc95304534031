"""One micro-batch through the model: trunk, needed rows, and what is done with them on the last pipeline stage.

Shape letters: T packed tokens on this rank, R rows, H hidden size, V vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from slime.backends.megatron_utils.model import unwrap
from slime.backends.megatron_utils.packing import MicroBatch, Parallel
from slime.backends.megatron_utils.rows import gather_rows


def parallel() -> Parallel:
    """This rank's layout as packing wants it; sequence parallelism is the caller's to set."""
    return Parallel(
        tp=mpu.get_tensor_model_parallel_world_size(),
        cp=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
    )


def row_hidden(hidden: Tensor, batch: MicroBatch, sequence_parallel: bool) -> Tensor:
    """Hidden states of the batch's rows, [R, H], the same on every tensor-parallel rank.

    hidden: what the trunk gave: the selected rows [R', 1, H], R' >= R, or [R' / tp, 1, H] under sequence parallelism; all
    tokens where the layout does not select. The gradient coming back must be complete on every rank (losses sum it over
    tensor parallelism).
    """
    group = mpu.get_tensor_model_parallel_group() if sequence_parallel else None
    if not batch.layout.select_rows:
        hidden = gather_rows(hidden, batch.layout.last_layer_rows, group)
    elif sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
    return hidden.squeeze(1)[: batch.num_rows]


def run(
    model,
    batches: list[MicroBatch],
    head: Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict]],
    *,
    forward_only: bool,
) -> list[dict]:
    """Runs the micro-batches through the pipeline schedule, with backward unless `forward_only`.

    head: (batch, hidden rows [R, H], weight shard [V / tp, H]) -> (scalar loss, what to keep). Returns what was kept for
    each micro-batch on the last pipeline stage, an empty list on the others.
    """
    sequence_parallel = unwrap(model).config.sequence_parallel
    kept: list[dict] = []

    def step(iterator: Iterator[MicroBatch], module):
        batch = next(iterator)

        def last_stage(hidden: Tensor, weight: Tensor) -> Tensor:
            loss, keep = head(batch, row_hidden(hidden, batch, sequence_parallel), weight)
            kept.append(keep)
            return loss

        output = module(batch.tokens, batch.positions, batch.layout, head=last_stage)
        # the loss is complete already: no token count, nothing to divide by
        return output, lambda loss: (loss, torch.zeros([], dtype=torch.int, device=batch.tokens.device), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=max((b.tokens.size(1) for b in batches), default=1),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return kept


@contextmanager
def evaluating(model):
    """Block without gradients in evaluation mode; restores training mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def scatter_rows(kept: Iterable[tuple[Tensor, Tensor, Tensor]], lengths: list[int], device, width: int = 0) -> list[Tensor]:
    """Row values back to responses: (sample [R], position [R], values [R] or [R, width]) triples -> one float64 tensor
    [L] or [L, width] a sample, 0 where no row was. float64 holds token ids exactly beside log-probs."""
    shape = (width,) if width else ()
    out = [torch.zeros((n, *shape), dtype=torch.float64, device=device) for n in lengths]
    for sample, position, values in kept:
        for s in sample.unique().tolist():
            here = sample == s
            out[s][position[here]] = values[here].double()
    return out
