"""Bytes on one GPU: the trainer's state and activations, the servers' weights and caches.

Trainer, a parameter: bf16 weights (2), fp32 gradients (4), and fp32 weights with two Adam moments (12), the last divided over the
data- and context-parallel ranks by the distributed optimizer; with `optimizer_cpu_offload` those are in host memory and the GPU holds
the chunks that pass through it. Activations with full recompute: the input of every layer, and the
working set of one.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.backends.megatron_utils.host_chunks import staging_bytes
from slime.planning.layout import Layout
from slime.planning.models import BF16, Model
from slime.planning.rates import Gpu, Rates
from slime.planning.workload import Workload

GIB = 2.0**30
SEQUENCES_HELD = 2  # a student engine that holds fewer whole responses is not worth starting
MICRO_BATCHES = (32_768, 16_384, 8_192, 4_096)


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one rank on its GPU. tokens: of its micro-batch (a context-parallel rank's share). host: page-locked memory, beside the GPU's."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    tokens: int
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def local_parameters(model: Model, layout: Layout) -> tuple[float, float]:
    """Parameters of the fullest rank: (all but experts, experts)."""
    s = model.shape
    tables = model.table_parameters * (1 if s.tied or layout.pp > 1 else 2)
    dense = (s.num_layers / layout.pp * model.dense_parameters + tables) / layout.tp
    experts = s.num_layers / layout.pp * model.expert_parameters / (layout.tp * layout.ep)
    return dense, experts


def working_width(model: Model) -> float:
    """Widths of one layer's intermediate tensors, added up."""
    s = model.shape
    ffn = s.moe_ffn_hidden_size * s.experts_per_token if s.is_moe else s.ffn_hidden_size
    return s.hidden_size + model.q_width + 2 * model.kv_width + 3 * ffn


def trainer_memory(model: Model, layout: Layout, work: Workload, rates: Rates, tokens: int) -> TrainerMemory:
    s = model.shape
    dense, experts = local_parameters(model, layout)
    shard = layout.dp * layout.cp
    optimizer = 12 * (dense / shard + experts / max(1.0, shard / layout.ep))
    host = 0.0
    if work.optimizer_cpu_offload:
        optimizer, host = min(optimizer, staging_bytes()), optimizer  # during the optimizer's step only, counted always
    kept = s.num_layers / layout.pp * s.hidden_size * BF16 * min(layout.pp, 4)  # stages ahead hold several micro-batches
    if not work.recompute:
        kept = s.num_layers / layout.pp * rates["activation_copies"] * working_width(model) * BF16
    working = rates["activation_copies"] * working_width(model) * BF16
    activations = tokens * (kept + working) / layout.tp
    rows = work.kept_rows / max(work.sequence_tokens, 1) * tokens * layout.cp
    head = model.table_parameters * BF16 / layout.tp + rates["head_chunk_bytes"] * 2 + rows * s.hidden_size * BF16 * 2
    return TrainerMemory(BF16 * (dense + experts), 4 * (dense + experts), optimizer, activations, head, tokens, host)


def best_trainer_memory(model: Model, layout: Layout, work: Workload, rates: Rates, room: float) -> TrainerMemory | None:
    """With the largest micro-batch that fits in `room` bytes and holds the longest sequence; None where none does."""
    need = -(-work.longest // layout.cp)
    sizes = (work.max_tokens,) if work.max_tokens else MICRO_BATCHES
    for size in sizes:
        found = trainer_memory(model, layout, work, rates, max(size, need))
        if found.total <= room:
            return found
    return None


def server_weights(model: Model, tp: int) -> float:
    tables = model.table_parameters * (1 if model.shape.tied else 2)
    layers = model.shape.num_layers * (model.dense_parameters + model.expert_parameters)
    return BF16 * (layers + tables) / tp


def cache_bytes(model: Model, tp: int) -> float:
    """Of one position on one GPU of a server; KV heads are repeated beyond their number."""
    return model.cache_bytes / min(tp, model.shape.num_kv_heads)


def usable(gpu: Gpu, rates: Rates) -> float:
    return gpu.memory * rates["usable_memory"]
