"""Seconds of generation and scoring.

A decoding step is as long as the longer of two things that run side by side: the scheduler's Python (`host`: a fixed part, and one for
each running request, more with top-K) and the GPU (weights and cache over the bandwidth, a fixed part a layer, logits and sampling of each
request). The cache grows while responses do, so a step can begin bound by the host and end bound by the GPU. Prefill comes before the
steps, building the replies after them. Scoring is operations of the GPU plus the host's work on each scored token: their sum.
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
    """wall: of the fullest engine. busy: GPU time within it. slack: time that steps without a CUDA graph leave to another process on
    the GPU (gaps of the others were seen to be too short for it). running: responses at once, on average. last_wave: share of an
    engine's responses that start last."""

    wall: float
    busy: float
    slack: float
    steps: float
    running: float
    waves: int
    last_wave: float
    prefill: float


@dataclass(frozen=True)
class ScoreSeconds:
    """total: of the fullest replica, nothing hidden. busy: GPU time within it. longest: of one sequence of the longest kind."""

    total: float
    busy: float
    longest: float


@dataclass(frozen=True)
class DecodeStep:
    """Seconds of one decoding step. first, last: of the GPU when responses begin and when they end."""

    host: float
    first: float
    last: float

    @property
    def wall(self) -> float:
        """The longer of host and GPU, on average while the cache grows evenly."""
        if self.host <= self.first:
            return self.gpu
        if self.host >= self.last:
            return self.host
        bound = (self.last - self.host) / (self.last - self.first)  # share of the steps that the GPU bounds
        return self.host + bound * (self.last - self.host) / 2

    @property
    def gpu(self) -> float:
        return (self.first + self.last) / 2


def decode_step(model: Model, tp: int, running: float, contexts: tuple[float, float], k: int, gpu: Gpu, rates: Rates) -> DecodeStep:
    """contexts: positions of a response's cache when it begins and when it ends."""
    host = rates["decode_host_seconds"] + running * (rates["decode_host_request_seconds"] + topk_seconds("decode", k, rates))
    layers = model.shape.num_layers
    message = TENSOR_MESSAGES * layers * rates["all_reduce_seconds"] if tp > 1 else 0.0
    each = rates["decode_sample_seconds"] + (rates["decode_topk_gpu_seconds"] if k else 0.0)
    fixed = decode_matmul_seconds(model, tp, running, gpu, rates) + layers * rates["decode_layer_seconds"] + message + running * each
    position = model.cache_bytes / min(tp, model.shape.num_kv_heads) / (gpu.bandwidth * rates["decode_cache_share"])
    first, last = (fixed + running * context * position for context in contexts)
    return DecodeStep(host, first, last)


def decode_matmul_seconds(model: Model, tp: int, running: float, gpu: Gpu, rates: Rates) -> float:
    """Weights read, or multiplied where the batch is large."""
    weights = model.decode_weight_bytes(running) / (gpu.bandwidth * rates["decode_weight_share"])
    compute = 2 * (model.trunk_active + model.table_parameters) * running / (gpu.matmul * rates["prefill_utilisation"])
    return max(weights, compute) / tp


def generate_seconds(model: Model, servers: Servers, work: Workload, gpu: Gpu, rates: Rates, room_tokens: float) -> GenerateSeconds:
    """room_tokens: positions that one engine's cache holds."""
    own = -(-work.responses // servers.count)
    most = max(1.0, min(own, work.student_concurrency, room_tokens // work.longest))
    waves = int(-(-own // most))
    tokens = own * work.mean
    prefill = prefill_seconds(model, servers.tp, own * work.prompt_len, work.prompt_len, gpu, rates)
    wall, busy, slack = prefill + tokens * (rates["reply_seconds"] + rates["reply_topk_seconds"] * work.k), prefill, 0.0
    stretches = _stretches(own, most, waves, work)
    for steps, running in stretches:
        step = decode_step(model, servers.tp, running, (work.prompt_len, work.prompt_len + work.mean), work.k, gpu, rates)
        seconds = step.wall
        if running > work.graph_batch:
            seconds = max(seconds, model.shape.num_layers * rates["decode_layer_seconds_without_graph"])
            slack += steps * (seconds - step.gpu)
        wall, busy = wall + steps * seconds, busy + steps * step.gpu
    steps = sum(s for s, _ in stretches)
    return GenerateSeconds(wall, busy, slack, steps, tokens / steps, waves, (own - (waves - 1) * most) / own, prefill)


def _stretches(own: float, most: float, waves: int, work: Workload) -> list[tuple[float, float]]:
    """(steps, responses at once): waves where all responses are equally long, else one stretch with a tail of the longest."""
    if work.mean >= work.response_len:
        full = [((waves - 1) * work.response_len, most)] if waves > 1 else []
        return [*full, (work.response_len, own - (waves - 1) * most)]
    steps = max(work.response_len, own * work.mean / most + (work.response_len - work.mean))
    return [(steps, own * work.mean / steps)]


def topk_seconds(part: str, k: int, rates: Rates) -> float:
    """What top-K adds to the host's work on one token that is sampled ("decode") or scored ("score")."""
    return rates[f"{part}_topk_fixed_seconds"] + rates[f"{part}_topk_seconds"] * k if k else 0.0


def prefill_seconds(model: Model, tp: int, tokens: float, positions: float, gpu: Gpu, rates: Rates) -> float:
    done = model.trunk_operations(tokens) + model.attention_operations(tokens, positions)
    sent = TENSOR_MESSAGES * model.shape.num_layers * 2 * (tp - 1) / tp * tokens * model.shape.hidden_size * BF16 / gpu.nvlink
    utilisation = rates["prefill_utilisation"] * (rates["expert_efficiency"] if model.shape.is_moe else 1.0)
    return done / tp / (gpu.matmul * utilisation) + sent


def score_seconds(model: Model, servers: Servers, work: Workload, gpu: Gpu, rates: Rates) -> ScoreSeconds:
    own = -(-work.responses // servers.count)

    def seconds(sequences: float, response: float) -> tuple[float, float]:
        """(GPU, host)."""
        positions = work.prompt_len + response
        head = model.head_operations(sequences * response) / servers.tp / (gpu.matmul * rates["prefill_utilisation"])
        trunk = prefill_seconds(model, servers.tp, sequences * positions, positions, gpu, rates)
        return trunk + head, sequences * response * (rates["score_token_seconds"] + topk_seconds("score", work.k, rates))

    busy, host = seconds(own, work.mean)
    call = rates["score_call_seconds"]
    return ScoreSeconds(call + busy + host, busy, call + sum(seconds(1, work.response_len)))


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
    return after, max(0.0, score.total - after - generate.slack) if same_gpus else 0.0
