"""Seconds of the trainer: operations at the measured utilisation, then what parallel layouts add."""

from __future__ import annotations

from dataclasses import dataclass

from slime.planning.layout import Layout
from slime.planning.memory import local_parameters
from slime.planning.models import BF16, Model
from slime.planning.rates import Gpu, Rates
from slime.planning.workload import Workload

FORWARD_AND_BACKWARD, ATTENTION_BACKWARD = 3, 3.5  # in units of the forward pass; attention's backward is 2.5 of it
PASSES = 3  # forward, recompute, backward: each sends what the forward pass sends, but recompute what nobody reads (recompute.py)


@dataclass(frozen=True)
class TrainSeconds:
    """compute: operations alone; the rest what a layout adds. operations: of all GPUs; useful: 6 a parameter and token."""

    compute: float
    micro_batches: float
    tensor: float
    context: float
    experts: float
    bubble: float
    gradients: float
    optimizer: float
    operations: float
    useful: float

    @property
    def total(self) -> float:
        return sum((self.compute, self.micro_batches, self.tensor, self.context, self.experts, self.bubble, self.gradients, self.optimizer))


def operations_of(model: Model, tokens: float, positions: float, rows: float, recompute: bool) -> tuple[float, float]:
    """Of one forward and backward pass over `tokens` tokens in sequences of `positions`, `rows` of them through the vocabulary matrix.

    (all that is computed, the useful part: 6 N a token, N without the vocabulary matrices, plus attention and rows; no recompute)
    """
    trunk, attention = model.trunk_operations(tokens), model.attention_operations(tokens, positions)
    useful = trunk * FORWARD_AND_BACKWARD + attention * ATTENTION_BACKWARD + FORWARD_AND_BACKWARD * model.head_operations(rows)
    return useful + (trunk - model.unread_operations(tokens) + attention if recompute else 0.0), useful


def operations(model: Model, work: Workload) -> tuple[float, float]:
    return operations_of(model, work.trained_tokens, work.prompt_len + work.trained_response, work.kept_rows, work.recompute)


def train_seconds(model: Model, layout: Layout, work: Workload, gpu: Gpu, rates: Rates, tokens: int, per_node: int) -> TrainSeconds:
    """Of all optimizer steps of a rollout; `tokens`: micro-batch of one context-parallel rank."""
    done, useful = operations(model, work)
    sequences = work.responses / work.optimizer_steps
    busiest = -(-sequences // layout.dp) / sequences  # a rank trains whole sequences
    replica = work.trained_tokens * busiest  # tokens of the busiest data-parallel rank
    utilisation = rates["train_utilisation"] * rates["tensor_parallel_efficiency"] ** (layout.tp.bit_length() - 1)
    if model.shape.is_moe:
        utilisation *= rates["expert_efficiency"]
    compute = done * busiest / (layout.tp * layout.cp * layout.pp) / (gpu.matmul * utilisation)
    count = max(work.optimizer_steps, -(-replica // (tokens * layout.cp)))
    layers = model.shape.num_layers
    compute = max(compute, count * layers / layout.pp * rates["layer_start_seconds"])  # small micro-batches wait for the host that starts kernels
    share = replica / layout.cp / layout.pp  # tokens x layers of one rank, in units of all layers
    wide = gpu.nvlink if layout.tp * layout.cp <= per_node else gpu.network
    width = model.shape.hidden_size * BF16
    messages = PASSES * 4 - (0 if model.shape.is_moe else 1)
    tensor = messages * layers * share * width * (layout.tp - 1) / layout.tp / gpu.nvlink
    context = PASSES * layers * share * 2 * model.kv_width * BF16 / layout.tp * (layout.cp - 1) / wide
    experts = 0.0
    if layout.ep > 1:
        moved = 2 * PASSES * layers * share * model.shape.experts_per_token * width * (layout.ep - 1) / layout.ep
        experts = moved / (gpu.nvlink if layout.tp * layout.ep <= per_node else gpu.network)
    fixed = count * rates["micro_batch_seconds"] * max(1.0, layers / 28) / layout.pp
    per_step = max(count / work.optimizer_steps, 1.0)
    bubble = (compute + tensor + fixed) * (layout.pp - 1) / per_step
    dense, expert = local_parameters(model, layout)
    group = layout.dp * layout.cp
    link = gpu.nvlink if layout.gpus <= per_node else gpu.network
    gradients = work.optimizer_steps * (4 + BF16) * (dense + expert) * (group - 1) / group / link
    optimizer = work.optimizer_steps * rates["optimizer_bytes"] * (dense + expert) / group / gpu.bandwidth
    if work.optimizer_cpu_offload:  # both ways at once, the kernels behind them
        optimizer = max(optimizer, work.optimizer_steps * 12 * (dense + expert) / group / rates["host_link_bytes"])
    return TrainSeconds(compute, fixed, tensor, context, experts, bubble, gradients, optimizer, done, useful)
