"""Seconds of generation and scoring.

A decoding step reads the weights once and the cache of every running response; its time is affine in the batch, so a whole
generation is (steps x fixed) + (tokens x per token) + (cache bytes / bandwidth). Prefill and scoring are bound by operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.planning.layout import Servers
from slime.planning.models import BF16, Model
from slime.planning.rates import Gpu, Rates
from slime.planning.workload import Workload

TENSOR_MESSAGES = 2  # all-reduces of one layer


@dataclass(frozen=True)
class GenerateSeconds:
    """wall: of the fullest engine. busy: GPU time within it (a step without a CUDA graph waits for Python). running: responses at
    once, on average. last_wave: share of an engine's responses that start last."""

    wall: float
    busy: float
    steps: float
    running: float
    waves: int
    last_wave: float
    prefill: float


@dataclass(frozen=True)
class ScoreSeconds:
    """total: of the fullest replica, nothing hidden. longest: of one sequence of the longest kind."""

    total: float
    longest: float


def generate_seconds(model: Model, servers: Servers, work: Workload, gpu: Gpu, rates: Rates, room_tokens: float) -> GenerateSeconds:
    """room_tokens: positions that one engine's cache holds."""
    own = -(-work.responses // servers.count)
    most = max(1.0, min(own, work.student_concurrency, room_tokens // work.longest))
    waves = int(-(-own // most))
    even = work.mean >= work.response_len
    steps = waves * work.response_len if even else max(work.response_len, own * work.mean / most + (work.response_len - work.mean))
    tokens = own * work.mean
    running = tokens / steps
    bandwidth = gpu.bandwidth * rates["decode_bandwidth_share"]
    weights = model.decode_weight_bytes(running) / servers.tp / bandwidth
    compute = 2 * (model.trunk_active + model.table_parameters) * running / servers.tp / (gpu.matmul * rates["prefill_utilisation"])
    context = work.prompt_len + work.mean / 2
    per_position = model.cache_bytes / min(servers.tp, model.shape.num_kv_heads)
    cache = tokens * context * per_position / bandwidth
    per_token = rates["decode_sample_seconds"] + topk_seconds("decode", work.k, rates)
    layers = model.shape.num_layers
    graph = layers * rates["decode_layer_seconds"]
    message = TENSOR_MESSAGES * layers * rates["all_reduce_seconds"] if servers.tp > 1 else 0.0
    eager_steps = _eager_steps(own, most, waves, work) if even else (steps if running > work.graph_batch else 0.0)
    waiting = eager_steps * layers * rates["decode_layer_seconds_without_graph"]
    prefill = prefill_seconds(model, servers.tp, own * work.prompt_len, work.prompt_len, gpu, rates)
    busy = steps * (max(weights, compute) + graph + message) + tokens * per_token + cache + prefill
    return GenerateSeconds(busy + waiting, busy, steps, running, waves, (own - (waves - 1) * most) / own, prefill)


def topk_seconds(part: str, k: int, rates: Rates) -> float:
    """What top-K adds to one token that is sampled ("decode") or scored ("score")."""
    return rates[f"{part}_topk_fixed_seconds"] + rates[f"{part}_topk_seconds"] * k if k else 0.0


def _eager_steps(own: float, most: float, waves: int, work: Workload) -> float:
    """Steps of equally long waves whose batch is too large for a CUDA graph."""
    last = own - (waves - 1) * most
    return work.response_len * ((waves - 1) * (most > work.graph_batch) + (last > work.graph_batch))


def prefill_seconds(model: Model, tp: int, tokens: float, positions: float, gpu: Gpu, rates: Rates) -> float:
    done = model.trunk_operations(tokens) + model.attention_operations(tokens, positions)
    sent = TENSOR_MESSAGES * model.shape.num_layers * 2 * (tp - 1) / tp * tokens * model.shape.hidden_size * BF16 / gpu.nvlink
    utilisation = rates["prefill_utilisation"] * (rates["expert_efficiency"] if model.shape.is_moe else 1.0)
    return done / tp / (gpu.matmul * utilisation) + sent


def score_seconds(model: Model, servers: Servers, work: Workload, gpu: Gpu, rates: Rates) -> ScoreSeconds:
    own = -(-work.responses // servers.count)

    def seconds(sequences: float, response: float) -> float:
        positions = work.prompt_len + response
        head = model.head_operations(sequences * response) / servers.tp / (gpu.matmul * rates["prefill_utilisation"])
        trunk = prefill_seconds(model, servers.tp, sequences * positions, positions, gpu, rates)
        return trunk + head + sequences * response * topk_seconds("score", work.k, rates)

    return ScoreSeconds(seconds(own, work.mean), seconds(1, work.response_len))


def not_hidden(generate: GenerateSeconds, score: ScoreSeconds, work: Workload, same_gpus: bool) -> tuple[float, float]:
    """(seconds of scoring after the last token, seconds that hidden scoring adds to generation on shared GPUs).

    Responses end evenly between the shortest's end and the end of generation, or wave by wave where all are equally long.
    Two processes on one GPU share its time; scoring fills what generation leaves idle first.
    """
    if not work.overlap:
        return score.total, 0.0
    if work.mean >= work.response_len:
        window = generate.wall * (generate.waves - 1) / generate.waves
        after = max(generate.last_wave * score.total, score.total - window)
    else:
        window = generate.wall * (1 - work.first_end)
        after = max(score.longest, score.total - window)
    after = min(after, score.total)
    slack = max(0.0, generate.wall - generate.busy)
    return after, max(0.0, score.total - after - slack) if same_gpus else 0.0
