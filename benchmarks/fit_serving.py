"""Fits the rates of decoding and scoring (slime/planning/serving.py) to the rows of services.py.

Rows with `steps` give a decoding step at several batch sizes, cached positions and K; each step is the longer of a line in what the host does
and a line in what the GPU does, and which of the two is found by turns: assign every step to the longer line, fit both, again. Rates that no
step tells about stay at a guess and are called `assumed`. Rows without `steps` (64 responses at once only) give sums, taken as the host's.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from slime.planning.models import Model
from slime.planning.rates import Gpu, Rate, Rates
from slime.planning.serving import decode_matmul_seconds, prefill_seconds

HOST = {"decode_host_seconds": 1e-3, "decode_host_request_seconds": 20e-6, "decode_topk_fixed_seconds": 5e-6, "decode_topk_seconds": 0.2e-6}
GPU = {"decode_layer_seconds": 40e-6, "decode_sample_seconds": 8e-6, "decode_topk_gpu_seconds": 2e-6, "decode_cache_share": 0.6}
WEIGHT_SHARE = 0.8  # of the bandwidth, while weights are read
GUESSED = {
    "decode_host_seconds": "Python of one step, any batch",
    "decode_host_request_seconds": "Python of one running request in a step",
    "decode_topk_fixed_seconds": "Python of top-K, any K",
    "decode_topk_seconds": "Python of top-K, each of the K",
    "decode_layer_seconds": "what a layer takes beside its weights and cache, in a CUDA graph",
    "decode_sample_seconds": "GPU: logits, soft-max and sampling",
    "decode_topk_gpu_seconds": "GPU: the K largest of the vocabulary",
    "decode_cache_share": "Triton attention; with the other guesses what was seen of the GPU in an earlier whole step",
}
STARTS = (0.5, 1.0, 2.0)  # times the guesses
PULL = 1e-3  # weight of a guess, beside one measured step
KNOWN_FROM = 0.9  # share of a rate that the data decide, for `measured`
LEAST = 10  # intervals that a measured rate rests on
FAR = 0.25  # a step this far off its line holds something else


@dataclass(frozen=True)
class Fitted:
    """value in the unit of the rate; measured: whether the data decide it."""

    value: float
    measured: bool
    how: str


def small_rates(utilisation: float) -> Rates:
    """What decode_matmul_seconds() and prefill_seconds() of a dense model read."""
    values = {"prefill_utilisation": utilisation, "decode_weight_share": WEIGHT_SHARE}
    return Rates({n: Rate(n, v, "", "measured", "") for n, v in values.items()}, {})


# ---------------------------------------------------------------------- decoding


def points_of(rows: list[dict]) -> np.ndarray:
    """[running, cached positions, seconds, K] of every step measured."""
    return np.array([[*step, row["K"]] for row in rows if row["part"] == "generate" for step in row.get("steps", ())], dtype=float).reshape(-1, 4)


def fit_decode(rows: list[dict], model: Model, gpu: Gpu, utilisation: float) -> dict[str, Fitted]:
    """Rates named in HOST and GPU."""
    points = points_of(rows)
    if not len(points):
        return _from_sums(rows)
    best = _best(points, model, gpu, utilisation)
    kept = points[np.abs(best.guess / points[:, 2] - 1) < FAR]
    final = _best(kept, model, gpu, utilisation)
    out, off = {}, f"all off by {final.error:.1%} on average"
    for names, bound, columns in ((HOST, ~final.on_gpu, _host_columns), (GPU, final.on_gpu, _gpu_columns)):
        count = int(bound.sum())
        sure = _decided(_scaled(columns(kept, model, gpu)[bound], kept[bound, 2], list(names.values()), names)) & (count >= LEAST)
        side = "GPU" if names is GPU else "host"
        for name, decided in zip(names, sure, strict=True):
            how = f"{count} of {len(kept)} intervals of decoding, those that the {side} bounds; {off}" if decided else f"{GUESSED[name]}; no step tells"
            out[name] = Fitted(final.values[name], bool(decided), how)
    return out


@dataclass
class _Turn:
    values: dict[str, float]
    guess: np.ndarray
    on_gpu: np.ndarray
    error: float


def _host_columns(points, model, gpu) -> np.ndarray:
    running, _, _, k = points.T
    return np.stack([np.ones_like(running), running, running * (k > 0), running * k], 1)


def _gpu_columns(points, model, gpu) -> np.ndarray:
    """The last one times 1 / decode_cache_share."""
    running, cached, _, k = points.T
    return np.stack([np.full_like(running, model.shape.num_layers), running, running * (k > 0), cached * model.cache_bytes / gpu.bandwidth], 1)


def _matmul(points, model, gpu, utilisation) -> np.ndarray:
    rates = small_rates(utilisation)
    found = {n: decode_matmul_seconds(model, 1, n, gpu, rates) for n in np.unique(points[:, 0])}
    return np.array([found[n] for n in points[:, 0]])


def _unit(names: dict[str, float], values) -> np.ndarray:
    """Coefficients of the columns for values of the rates, and back: a share divides."""
    return np.array([1 / v if n.endswith("_share") else v for n, v in zip(names, values, strict=True)])


def _scaled(columns, seconds, values, names) -> np.ndarray:
    """Columns in shares of the measured seconds, at the values given."""
    return columns * _unit(names, values) / seconds[:, None]


def _best(points, model, gpu, utilisation) -> _Turn:
    """The nearest of the fits that start at several sizes of what the host and the GPU do."""
    return min((_by_turns(points, model, gpu, utilisation, *start) for start in itertools.product(STARTS, STARTS)), key=lambda f: f.error)


def _by_turns(points, model, gpu, utilisation, host_start: float, gpu_start: float) -> _Turn:
    given = _matmul(points, model, gpu, utilisation)
    host, device = _host_columns(points, model, gpu), _gpu_columns(points, model, gpu)
    a, b = host_start * _unit(HOST, HOST.values()), gpu_start * _unit(GPU, GPU.values())
    on_gpu, turns = given + device @ b > host @ a, []
    while not any((on_gpu == t).all() for t in turns):  # ends: at a fit that stays, or where turns repeat
        turns.append(on_gpu)
        a = _line(host[~on_gpu], points[~on_gpu, 2], points[~on_gpu, 2], HOST)
        b = _line(device[on_gpu], points[on_gpu, 2] - given[on_gpu], points[on_gpu, 2], GPU)
        on_gpu = given + device @ b > host @ a
    guess = np.maximum(host @ a, given + device @ b)
    values = dict(zip(HOST, a, strict=True)) | dict(zip(GPU, _unit(GPU, np.maximum(b, 1e-12)), strict=True))
    values["decode_cache_share"] = min(1.0, values["decode_cache_share"])
    return _Turn(values, guess, on_gpu, float(np.mean(np.abs(guess / points[:, 2] - 1))))


def _line(columns, left, seconds, guesses: dict[str, float]) -> np.ndarray:
    """Coefficients from 0 up, least squares of relative errors, each drawn to its guess with the weight PULL."""
    prior = _unit(guesses, guesses.values())
    matrix = np.concatenate([columns * prior / seconds[:, None], PULL * np.eye(len(prior))])
    target = np.concatenate([left / seconds, np.full(len(prior), PULL)])
    return nnls(matrix, target)[0] * prior


def _decided(matrix: np.ndarray) -> np.ndarray:
    """Whether each column's coefficient follows from the rows: the diagonal of the resolution matrix with the pull of the guesses."""
    normal = matrix.T @ matrix
    return np.diag(np.linalg.solve(normal + PULL**2 * np.eye(len(normal)), normal)) > KNOWN_FROM


def _from_sums(rows) -> dict[str, Fitted]:
    """Of equally long responses sampled at one batch size, at K = 0, 16 and 64: all of a step as the host's. Their prompts were in the cache."""
    from_k = {r["K"]: r for r in rows if r["part"] == "generate"}
    batch, prompt, length = _shape(from_k[0])
    step = {k: r["seconds"] / length for k, r in from_k.items()}
    each = (step[64] - step[16]) / 48 / batch
    what = f"{batch} x {prompt} + {length} tokens"
    found = {n: Fitted(v, False, GUESSED[n]) for n, v in {**HOST, **GPU}.items()}
    request = (step[0] - HOST["decode_host_seconds"]) / batch
    return found | {
        "decode_host_request_seconds": Fitted(request, True, f"sampling {what}, no top-K: a step less the assumed fixed part"),
        "decode_topk_seconds": Fitted(each, True, f"sampling {what}, between K = 16 and 64"),
        "decode_topk_fixed_seconds": Fitted((step[16] - step[0]) / batch - 16 * each, True, f"sampling {what}: the line at K = 0, less no top-K"),
    }


def _shape(row: dict) -> tuple[int, int, int]:
    """(responses, prompt, tokens of a response); early rows do not say: services.py's sizes on a GPU."""
    return row.get("responses", 64), row.get("prompt_len", 256), row.get("response_len", 512)


def fit_replies(rows: list[dict], model: Model, gpu: Gpu, utilisation: float) -> dict[str, Fitted]:
    """reply_seconds a token, reply_topk_seconds a token and K: what prefill and steps leave of the seconds of whole calls."""
    matrix, left = [], []
    for row in (r for r in rows if r["part"] == "generate" and r.get("steps")):
        batch, prompt, length = _shape(row)
        first = prefill_seconds(model, 1, batch * prompt, prompt, gpu, small_rates(utilisation))
        rest = row["seconds"] - first - length * statistics.mean(s[2] for s in row["steps"])
        matrix.append([batch * length / row["seconds"], batch * length * row["K"] / row["seconds"]])
        left.append(rest / row["seconds"])
    values = nnls(np.array(matrix), np.array(left))[0] if matrix else (0.0, 0.0)
    how = "what prefill and steps leave of whole calls" if matrix else "within the host's work on a request: its steps are whole calls divided"
    return {n: Fitted(float(v), bool(matrix), how) for n, v in zip(("reply_seconds", "reply_topk_seconds"), values, strict=True)}


# ---------------------------------------------------------------------- scoring


def fit_score(rows: list[dict], model: Model, gpu: Gpu) -> dict[str, Fitted]:
    """prefill_utilisation, score_call_seconds, score_token_seconds, score_topk_fixed_seconds, score_topk_seconds.

    The GPU's share from what cached prompts save (the same tokens are scored, fewer are computed); what it leaves of the other runs is the
    host's. The fixed part of a call from the one sequence that `overlap` scores alone, its longest.
    """
    spans = {(r["K"], r["span"]): r for r in rows if r["part"] == "score" and "span" in r}
    full = {k: r for (k, span), r in spans.items() if span == "response"}
    shares = []
    for k, row in full.items():
        batch, prompt, _ = _shape(row)
        saved = model.trunk_operations(batch * prompt) + model.attention_operations(batch * prompt, prompt)
        shares.append(saved / (row["seconds"] - spans[k, "response, prompt cached"]["seconds"]) / gpu.matmul)
    utilisation = statistics.median(shares)
    alone = [{**full[16], "responses": 1, "seconds": r["last_score"]} for r in rows if "last_score" in r][:1] if 16 in full else []
    used = [*full.values(), *(r for (_, span), r in spans.items() if span == "response, last load"), *alone]
    matrix, left = [], []
    for row in used:
        batch, prompt, length = _shape(row)
        whole, tokens = batch * (prompt + length), batch * length
        done = model.trunk_operations(whole) + model.attention_operations(whole, prompt + length) + model.head_operations(tokens)
        matrix.append(np.array([bool(alone), tokens, tokens * (row["K"] > 0), tokens * row["K"]]) / row["seconds"])
        left.append(1 - done / utilisation / gpu.matmul / row["seconds"])
    values = nnls(np.array(matrix), np.array(left))[0]
    ks = ", ".join(str(k) for k in sorted(full))
    found = {"prefill_utilisation": Fitted(utilisation, True, f"4B scoring: what prompts in the cache save, median over K = {ks}")}
    for name, value in zip(("score_call_seconds", "score_token_seconds", "score_topk_fixed_seconds", "score_topk_seconds"), values, strict=True):
        measured = bool(alone) or name != "score_call_seconds"
        found[name] = Fitted(float(value), measured, f"4B scoring responses, K = {ks}, and one alone: what the GPU leaves" if measured else "no sequence scored alone")
    return found
