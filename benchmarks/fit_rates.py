"""Rates for tools/plan_run.py from the raw results beside it: writes benchmarks/results/rates.json.

    python benchmarks/fit_rates.py            # after new measurements
    python benchmarks/fit_rates.py --check    # 1 when rates.json is not what the raw results give

Every rate names its file and how it follows. `measured`: from a benchmark of that piece alone; `calibrated`: from the whole steps
that predictions are compared with; `assumed`: a data sheet or a guess, to be replaced by a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from slime.planning.memory import GIB, working_width  # noqa: E402
from slime.planning.models import BF16, load_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHEET, GUESS = "data sheet", "assumption"
GPUS = {  # matmul, memory, bandwidth, nvlink, network
    "H200": (790e12, 143_771 * 2**20, 4.8e12, 360e9, 40e9, "matmul measured (serving_h200.json); memory as the driver says; the rest data sheet x 0.8"),
    "H100": (790e12, 81_559 * 2**20, 3.35e12, 360e9, 40e9, "matmul taken as the H200's (same chip); the rest data sheet, links x 0.8"),
    "A100": (265e12, 81_920 * 2**20, 2.0e12, 240e9, 20e9, "data sheet x 0.85, links x 0.8; never run here"),
}


def load(name: str):
    text = (RESULTS / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def rate(value: float, unit: str, status: str, source: str, how: str) -> dict:
    return {"value": float(f"{value:.4g}"), "unit": unit, "status": status, "source": source, "how": how}


def training_rates() -> dict:
    source, model, budget = "loss_rows_megatron_h200.json", load_model("1.7B"), 0.1
    rows = {r["tokens"]: r for r in load(source)["tables"]["whole step"] if r["way"].startswith("kept, ours")}  # the last one: the default
    (small, large) = sorted(rows)
    span, seconds = large - small, (rows[large]["ms"] - rows[small]["ms"]) / 1e3
    done = model.trunk_operations(span) * 4 + model.attention_operations(span, 4096) * 4.5 + 3 * model.head_operations(budget * span)
    fixed = rows[small]["ms"] / 1e3 - small * seconds / span
    a_token = (rows[large]["peak GiB"] - rows[small]["peak GiB"]) * GIB / span
    kept = model.shape.num_layers * model.shape.hidden_size * BF16
    both = f"of {small:,} and {large:,} tokens (kept rows, full recompute)"
    return {
        "train_utilisation": rate(done / seconds / 790e12, "of the matmul rate", "measured", source, f"operations over the time difference {both}"),
        "micro_batch_seconds": rate(fixed, "s", "measured", source, f"what the line through the times {both} leaves at 0 tokens"),
        "activation_copies": rate((a_token - kept) / (BF16 * working_width(model)), "x the widths of one layer", "measured", source,
                                  f"slope of the peaks {both}, less the inputs of all layers"),
        "head_chunk_bytes": rate(512 * 2**20, "bytes", "measured", "losses/linear_head.py", "the chunk of logits on a GPU"),
        "optimizer_bytes": rate(30 / 0.4, "bytes a parameter over the bandwidth", "assumed", GUESS, "30 bytes read and written, at 0.4 of the bandwidth"),
        "tensor_parallel_efficiency": rate(0.95, "a doubling of TP", "assumed", GUESS, "narrower matrices"),
        "expert_efficiency": rate(0.6, "of a dense model's utilisation", "assumed", GUESS, "small matrices of single experts"),
        "usable_memory": rate(0.94, "of the card", "assumed", GUESS, "context, fragmentation, NCCL buffers"),
    }  # fmt: skip


def serving_rates() -> dict:
    source = "serving_h200.json"
    raw = load(source)
    student, teacher = load_model("1.7B"), load_model("4B")
    batch, prompt, length = raw["prompts"], raw["prompt_tokens"], raw["response_tokens"]
    tokens, gpu = batch * length, GPUS["H200"]
    calls = {(c["call"], c.get("span"), c["K"]): sum(c["seconds"]) / len(c["seconds"]) for c in raw["calls"] if "note" not in c}
    whole = batch * (prompt + length)
    scored = calls["score", "whole", 0]
    done = teacher.trunk_operations(whole) + teacher.attention_operations(whole, prompt + length) + teacher.head_operations(whole)
    prefill = done / scored / 790e12
    share, sample = 0.8, 1e-6
    bandwidth = gpu[2] * share
    weights = student.decode_weight_bytes(batch) / bandwidth
    cache = tokens * (prompt + length / 2) * student.cache_bytes / bandwidth
    first = (student.trunk_operations(batch * prompt) + student.attention_operations(batch * prompt, prompt)) / (790e12 * prefill)
    layer = (calls["generate", None, 0] - first - cache - tokens * sample) / length - weights
    step = load("opd_step_one_h200_64x4x1024_r0p10_first.jsonl")[0]
    eager = _eager(step["seconds/sample"], student, layer / student.shape.num_layers, prefill, bandwidth, sample, calls, tokens)
    what = "64 x 256 + 512 tokens"
    return {
        "prefill_utilisation": rate(prefill, "of the matmul rate", "measured", source, f"4B scoring whole sequences, no top-k, {what}"),
        "score_topk_seconds": rate((calls["score", "whole", 16] - scored) / whole / 16, "s a token and K", "measured", source,
                                   "mean of two calls with top-16, less without; taken as linear in K"),
        "decode_bandwidth_share": rate(share, "of the bandwidth", "assumed", GUESS, "weights and cache as read while decoding"),
        "decode_sample_seconds": rate(sample, "s a token", "assumed", GUESS, "soft-max and sampling"),
        "decode_layer_seconds": rate(layer / student.shape.num_layers, "s a layer and step", "measured", source,
                                     f"1.7B, CUDA graphs, {what}: what weights, cache and prefill leave of a step"),
        "decode_topk_seconds": rate((calls["generate", None, 16] - calls["generate", None, 0]) / tokens / 16, "s a token and K", "measured", source,
                                    "with top-16, less without; taken as linear in K and the batch"),
        "decode_layer_seconds_without_graph": rate(eager / student.shape.num_layers, "s a layer and step", "calibrated",
                                                   "opd_step_one_h200_64x4x1024_r0p10_first.jsonl, rollout 0",
                                                   "what the rest of the model leaves of its 45.3 s of sampling; the only run without graphs"),
        "all_reduce_seconds": rate(12e-6, "s a message", "assumed", GUESS, "of one layer's half, while decoding over NVLink"),
        "server_reserve_bytes": rate(4 * GIB, "bytes", "assumed", GUESS, "CUDA graphs, work space and context of one server"),
        "sync_copy_bytes": rate(student.parameters * BF16 / load("opd_step_one_h200_64x4x1024_r0p10_first.jsonl")[1]["seconds/sync"], "bytes a second",
                                "calibrated", "opd_step_one_h200_64x4x1024_r0p10_first.jsonl, rollout 1", "1.7B over CUDA handles in 0.07 s"),
    }  # fmt: skip


def _eager(measured, student, layer, prefill, bandwidth, sample, calls, tokens) -> float:
    """Seconds a step that rollout 0 of the whole step waited beyond a step with a graph: 205 responses at once, then 51."""
    responses, prompt, length, running = 256, 256, 1024, 205
    per_token = sample + (calls["generate", None, 16] - calls["generate", None, 0]) / tokens
    cache = responses * length * (prompt + length / 2) * student.cache_bytes / bandwidth
    graph = layer * student.shape.num_layers + student.decode_weight_bytes(running) / bandwidth
    first = (student.trunk_operations(responses * prompt) + student.attention_operations(responses * prompt, prompt)) / (790e12 * prefill)
    return (measured - first - cache - responses * length * per_token - 2 * length * graph) / length


def manager_rates() -> dict:
    source = "manager.json"
    rows = {r["K"]: r for r in load(source)["rows"] if r["tokens"] == max(x["tokens"] for x in load(source)["rows"])}
    (k0, k1), out = sorted(rows), {}
    values = {k: {"parse_us": r["parse_generate"] + r["parse_score"], "select_us": r["select"], "generate_bytes": r["generate_bytes"],
                  "score_bytes": r["score_bytes"], "ship_bytes": r["ship_bytes"]} for k, r in rows.items()}  # fmt: skip
    for name in values[k0]:
        slope = (values[k1][name] - values[k0][name]) / (k1 - k0)
        unit = "us of a core a response token" if name.endswith("us") else "bytes a response token"
        out[f"{name}_fixed"] = rate(max(0.0, values[k0][name] - slope * k0), unit, "measured", source, f"line through K = {k0} and {k1}, at K = 0")
        out[f"{name}_per_k"] = rate(slope, f"{unit} and K", "measured", source, f"slope between K = {k0} and {k1}")
    step = load("opd_step_one_h200_64x4x1024_r0p10_first.jsonl")
    second = step[1]  # rollout 0 imports and allocates
    recorded = "opd_step_one_h200_64x4x1024_r0p10_first.jsonl"
    select = values[k0]["select_us"] * second["rollout/valid_tokens"] * 1e-6
    return out | {
        "bank_us": rate(rows[k0]["bank_wall"], "us a response token", "measured", source, "parquet, written by a thread of the manager"),
        "bank_bytes": rate(rows[k0]["bank_bytes"], "bytes a response token", "measured", source, "parquet, without raw top-K"),
        "manager_factor": rate(second["seconds/select"] / select, "x this CPU's time", "calibrated", f"{recorded}, rollout 1",
                               "the manager beside its client threads on the GPU host, against manager.py alone"),
        "split_us": rate(second["seconds/split"] / second["rollout/valid_tokens"] * 1e6, "us a response token", "calibrated", f"{recorded}, rollout 1",
                         "metrics of the rollout, collecting, splitting, and Ray's put"),
    }  # fmt: skip


def rates() -> dict:
    gpus = {kind: {**dict(zip(("matmul", "memory", "bandwidth", "nvlink", "network"), values[:5], strict=True)), "notes": {"source": values[5]}}
            for kind, values in GPUS.items()}  # fmt: skip
    return {"command": "python benchmarks/fit_rates.py", "gpus": gpus, "rates": {**training_rates(), **serving_rates(), **manager_rates()}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when rates.json is out of date")
    args = parser.parse_args(argv)
    text, path = json.dumps(rates(), indent=1) + "\n", RESULTS / "rates.json"
    if args.check:
        if not path.is_file() or path.read_text() != text:
            print(f"{path} is out of date; run python benchmarks/fit_rates.py", file=sys.stderr)
            return 1
        return 0
    path.write_text(text)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
