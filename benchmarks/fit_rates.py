"""Rates for tools/plan_run.py from the raw results beside it: writes benchmarks/results/rates.json.

    python benchmarks/fit_rates.py            # after new measurements
    python benchmarks/fit_rates.py --check    # 1 when rates.json is not what the raw results give

Every rate names its file and how it follows. `measured`: from a benchmark of that piece alone; `calibrated`: from the whole steps
that predictions are compared with; `assumed`: a data sheet or a guess, to be replaced by a measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from benchmarks import fit_serving  # noqa: E402
from slime.planning import serving  # noqa: E402
from slime.planning.memory import GIB, working_width  # noqa: E402
from slime.planning.models import BF16, load_model  # noqa: E402
from slime.planning.rates import Gpu, Rate, Rates  # noqa: E402
from ta_opd.errors import DataError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GUESS = "assumption"
STEP = "opd_step_one_h200_64x4x1024_r0p10.json"  # the whole step that predictions are compared with
FIRST = "opd_step_one_h200_64x4x1024_r0p10_first.jsonl"  # an earlier one: 205 responses at once, CUDA graphs for 64 only
SHORT = "opd_step_one_h200_4x2x64_r0p10.json"  # 8 responses of 64 tokens
SERVICES = "services_h200.json"  # services.py --device cuda --parts generate score overlap sync --json
PARTS = ("generate", "score", "overlap", "sync")
DEFAULT_WAY = "kept, ours, last layer on kept rows"
OPTIMIZER_BYTES = 30 / 0.4  # a parameter: 30 bytes read and written, at 0.4 of the bandwidth
MATMUL = float(f"{json.loads((RESULTS / STEP).read_text())['machine']['matmul_operations_per_second']:.4g}")
UNITS = {
    "prefill_utilisation": "of the matmul rate", "score_call_seconds": "s a rollout", "score_token_seconds": "s a token",
    "score_topk_fixed_seconds": "s a token, any K above 0", "score_topk_seconds": "s a token and K", "decode_host_seconds": "s a step", "decode_host_request_seconds": "s a running request and step",
    "decode_topk_fixed_seconds": "s a token, any K above 0", "decode_topk_seconds": "s a token and K", "decode_layer_seconds": "s a layer and step",
    "decode_sample_seconds": "s a token", "decode_topk_gpu_seconds": "s a token, any K above 0", "decode_cache_share": "of the bandwidth",
    "reply_seconds": "s a token", "reply_topk_seconds": "s a token and K",
}  # fmt: skip
GPUS = {  # matmul, memory, bandwidth, nvlink, network
    "H200": (MATMUL, 143_771 * 2**20, 4.8e12, 360e9, 40e9, f"matmul measured ({STEP}); memory as the driver says; the rest data sheet x 0.8"),
    "H100": (MATMUL, 81_559 * 2**20, 3.35e12, 360e9, 40e9, "matmul taken as the H200's (same chip); the rest data sheet, links x 0.8"),
    "A100": (265e12, 81_920 * 2**20, 2.0e12, 240e9, 20e9, "data sheet x 0.85, links x 0.8; never run here"),
}


def load(name: str):
    text = (RESULTS / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def rate(value: float, unit: str, status: str, source: str, how: str) -> dict:
    return {"value": float(f"{value:.4g}"), "unit": unit, "status": status, "source": source, "how": how}


def training_rates() -> dict:
    source, model, budget = "loss_rows_megatron_h200.json", load_model("1.7B"), 0.1
    found = load(source)
    rows = {r["tokens"]: r for r in found["tables"]["whole step"] if r["gradients"] == "fp32" and r["way"] == DEFAULT_WAY}
    (small, large) = sorted(rows)
    span, seconds = large - small, (rows[large]["ms"] - rows[small]["ms"]) / 1e3
    done = model.trunk_operations(span) * 4 + model.attention_operations(span, 4096) * 4.5 + 3 * model.head_operations(budget * span)
    done -= model.unread_operations(span)
    fixed = rows[small]["ms"] / 1e3 - small * seconds / span
    a_token = (rows[large]["peak GiB"] - rows[small]["peak GiB"]) * GIB / span
    kept = model.shape.num_layers * model.shape.hidden_size * BF16
    both = f"of {small:,} and {large:,} tokens (kept rows, full recompute)"
    return {
        "train_utilisation": rate(done / seconds / MATMUL, "of the matmul rate", "measured", source, f"operations over the time difference {both}"),
        "micro_batch_seconds": rate(fixed, "s", "measured", source, f"what the line through the times {both} leaves at 0 tokens"),
        "layer_start_seconds": rate(_layer_start(model, fixed), "s a layer and micro-batch", "calibrated", SHORT,
                                    "what the host takes to start a layer's kernels forward, again and backward: that step's training, less the other parts"),
        "activation_copies": rate((a_token - kept) / (BF16 * working_width(model)), "x the widths of one layer", "measured", source,
                                  f"slope of the peaks {both}, less the inputs of all layers"),
        "head_chunk_bytes": rate(512 * 2**20, "bytes", "measured", "losses/linear_head.py", "the chunk of logits on a GPU"),
        "optimizer_bytes": rate(OPTIMIZER_BYTES, "bytes a parameter over the bandwidth", "assumed", GUESS, "30 bytes read and written, at 0.4 of the bandwidth"),
        "host_link_bytes": rate(45e9, "B/s each way", "assumed", GUESS, "optimizer state in host memory: PCIe 5 x16, both directions at once"),
        "tensor_parallel_efficiency": rate(0.95, "a doubling of TP", "assumed", GUESS, "narrower matrices"),
        "expert_efficiency": rate(0.6, "of a dense model's utilisation", "assumed", GUESS, "small matrices of single experts"),
        "usable_memory": rate(0.94, "of the card", "assumed", GUESS, "context, fragmentation, NCCL buffers"),
    }  # fmt: skip


def _layer_start(model, fixed: float) -> float:
    """Of a step so short that its micro-batch of 2,500 tokens computes for less time than the host takes to start its kernels."""
    optimizer = OPTIMIZER_BYTES * model.parameters / GPUS["H200"][2]
    return (load(SHORT)["seconds"]["train"] - fixed - optimizer) / model.shape.num_layers


def serving_rates() -> dict:
    source, step = SERVICES, load(STEP)
    student, teacher = load_model("1.7B"), load_model("4B")
    raw = load(source)
    missing = [p for p in PARTS if not any(r["part"] == p for r in raw)]
    if missing:
        raise DataError(f"{RESULTS / source}: expected rows of the parts {', '.join(PARTS)}, got none of {', '.join(missing)}; run services.py with all of them")
    gpu = Gpu("H200", *GPUS["H200"][:5])
    copies = [r for r in raw if r["part"] == "sync" and r["round"] > 0]
    copy = copies[0]["GB"] * 1e9 / statistics.median(r["seconds"] for r in copies)
    score = fit_serving.fit_score(raw, teacher, gpu)
    prefill = score["prefill_utilisation"].value
    fitted = score | fit_serving.fit_decode(raw, student, gpu, prefill) | fit_serving.fit_replies(raw, student, gpu, prefill)
    rest = load(FIRST)[0]["seconds/sample"] - _few_at_once(fitted, student, gpu)
    sync = step["seconds"]["sync"] - student.parameters * BF16 / copy
    return {
        **{n: rate(f.value, UNITS[n], "measured" if f.measured else "assumed", source if f.measured else GUESS, f.how) for n, f in fitted.items()},
        "decode_weight_share": rate(fit_serving.WEIGHT_SHARE, "of the bandwidth", "assumed", GUESS, "weights as read while decoding"),
        "decode_layer_seconds_without_graph": rate(rest / 1024 / student.shape.num_layers, "s a layer and step, all in it", "calibrated", f"{FIRST}, rollout 0",
                                                   "what 1,024 steps with 51 responses leave of its 45.3 s of sampling; the only run without graphs"),
        "all_reduce_seconds": rate(12e-6, "s a message", "assumed", GUESS, "of one layer's half, while decoding over NVLink"),
        "server_reserve_bytes": rate(4 * GIB, "bytes", "assumed", GUESS, "CUDA graphs, work space and context of one server"),
        "sync_copy_bytes": rate(copy, "bytes a second", "measured", source, "1.7B over CUDA handles to an engine that does nothing else"),
        "sync_fixed_seconds": rate(sync, "s", "calibrated", STEP, f"what the copy leaves of its {step['seconds']['sync']:.3f} s: pausing, flushing, resuming"),
    }  # fmt: skip


def _few_at_once(fitted, student, gpu) -> float:
    """Seconds of FIRST's second wave, 51 responses with CUDA graphs, and of all its prefill and replies."""
    values = {n: f.value for n, f in fitted.items()} | {"decode_weight_share": fit_serving.WEIGHT_SHARE}
    rates = Rates({n: Rate(n, v, "", "measured", "") for n, v in values.items()}, {})
    step = serving.decode_step(student, 1, 51, (256, 256 + 1024), 16, gpu, rates)
    replies = 256 * 1024 * (rates["reply_seconds"] + 16 * rates["reply_topk_seconds"])
    return 1024 * step.wall + serving.prefill_seconds(student, 1, 256 * 256, 256, gpu, rates) + replies


def manager_rates() -> dict:
    source = "manager.json"
    rows = {r["K"]: r for r in load(source)["rows"] if r["tokens"] == max(x["tokens"] for x in load(source)["rows"])}
    (k0, k1), out = sorted(rows), {}
    values = {k: {"parse_us": r["parse_generate"] + r["parse_score"], "measure_us": r["measure"], "select_us": r["select"],
                  "generate_bytes": r["generate_bytes"], "score_bytes": r["score_bytes"],
                  "ship_bytes": r["ship_bytes"]} for k, r in rows.items()}  # fmt: skip
    for name in values[k0]:
        slope = (values[k1][name] - values[k0][name]) / (k1 - k0)
        unit = "us of a core a response token" if name.endswith("us") else "bytes a response token"
        out[f"{name}_fixed"] = rate(max(0.0, values[k0][name] - slope * k0), unit, "measured", source, f"line through K = {k0} and {k1}, at K = 0")
        out[f"{name}_per_k"] = rate(slope, f"{unit} and K", "measured", source, f"slope between K = {k0} and {k1}")
    step = load(STEP)  # medians of rollouts 1 and 2: rollout 0 imports and allocates
    tokens = step["medians"]["rollout/valid_tokens"]
    return out | {
        "bank_us": rate(rows[k0]["bank_wall"], "us a response token", "measured", source, "parquet, written by a thread of the manager"),
        "bank_bytes": rate(rows[k0]["bank_bytes"], "bytes a response token", "measured", source, "parquet, without raw top-K"),
        "manager_factor": rate(step["seconds"]["select"] / ((values[k0]["measure_us"] + values[k0]["select_us"]) * tokens * 1e-6), "x this CPU's time",
                               "calibrated", STEP, "the manager beside its client threads on the GPU host, against manager.py alone; measured when selecting then"),
        "split_us": rate(step["seconds"]["split"] / tokens * 1e6, "us a response token", "calibrated", STEP,
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
