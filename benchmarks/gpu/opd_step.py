"""Whole OPD steps of train.py at real model shapes: seconds by phase, peak memory, a timeline.

    python benchmarks/gpu/opd_step.py --models DIR --topology one --case 64x4x1024 --budget 0.10 --output-dir OUT

Topologies: `one` (everything on one GPU), `apart` (servers on one GPU, trainer on the other), `tp2` (trainer TP2 over two
GPUs, servers on the same ones). `--stock` runs the same step with the stock choices switched on by our own flags.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("generate", "score", "select", "split", "train", "sync", "save", "eval")
TOPOLOGIES = {
    "one": ["--colocate", "--teacher-colocate"],
    "apart": ["--actor-num-gpus-per-node", "1"],
    "tp2": ["--colocate", "--teacher-colocate", "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
}
STOCK = ["--opd-profile", "released", "--opd-loss-rows", "all", "--score-after-generation", "--score-whole-sequence"]


def command(args, out: Path) -> list[str]:
    prompts, samples, length = (int(x) for x in args.case.split("x"))
    words = [
        sys.executable, str(ROOT / "slime_ta_opd" / "train.py"),
        "--hf-checkpoint", f"{args.models}/{args.student}", "--teacher-model", f"{args.models}/{args.teacher}",
        "--prompt-data", f"{args.models}/prompts.jsonl", "--label-key", "label", "--rollout-shuffle",
        "--rollout-batch-size", prompts, "--n-samples-per-prompt", samples, "--rollout-max-response-len", length,
        "--num-rollout", args.steps, "--opd-topk-metrics-k", args.k, "--opd-budget-mask", args.mask,
        "--opd-budget-ratio", args.budget, "--opd-loss-type", args.loss, "--lr", "1e-6",
        "--max-tokens-per-gpu", args.max_tokens, "--output-dir", out, "--run-name", out.name, "--trace", "--no-use-tensorboard",
        "--opd-token-bank-dir", out / "token_bank", "--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1", *TOPOLOGIES[args.topology], *args.extra,
    ]  # fmt: skip
    if args.stock:
        words += STOCK
    return [str(w) for w in words]


def table(out: Path, skip: int) -> dict[str, float]:
    """Medians over the steps after the first `skip`."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][skip:]
    keys = sorted({k for r in rows for k, v in r.items() if isinstance(v, (int, float))})
    return {k: statistics.median(r[k] for r in rows if r.get(k) is not None) for k in keys if any(r.get(k) is not None for r in rows)}


def timeline(out: Path) -> None:
    """The Chrome trace as a picture: one row a process and phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    begin = min(e["ts"] for e in spans)
    names = list(dict.fromkeys(e["name"] for e in spans))
    figure, axis = plt.subplots(figsize=(12, 1.2 + 0.45 * len(names)))
    colours = plt.get_cmap("tab10")
    for e in spans:
        axis.barh(names.index(e["name"]), e["dur"] / 1e6, left=(e["ts"] - begin) / 1e6, color=colours(names.index(e["name"]) % 10), edgecolor="white")
    axis.set_yticks(range(len(names)), [f"{n}" for n in names])
    axis.invert_yaxis()
    axis.set_xlabel("seconds since the first step")
    axis.set_title(f"{out.name}: phases of a run ({', '.join(rows.values())})")
    figure.tight_layout()
    figure.savefig(out / "timeline.png", dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="directory that random_models.py wrote")
    parser.add_argument("--student", default="qwen3-1.7B")
    parser.add_argument("--teacher", default="qwen3-4B")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="one")
    parser.add_argument("--case", default="64x4x1024", help="prompts x samples x response tokens")
    parser.add_argument("--budget", default="0.10")
    parser.add_argument("--mask", default="dlearn_high")
    parser.add_argument("--loss", default="topk_reverse_kl")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--skip", type=int, default=1, help="first steps left out of the medians")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("extra", nargs="*", help="after --: further flags of train.py")
    args = parser.parse_args(argv)
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    words = command(args, out)
    began = time.time()
    code = subprocess.call(words, cwd=ROOT / "slime_ta_opd")
    if code:
        return code
    medians = table(out, args.skip)
    total = medians["seconds/total"]
    print(f"\n{out.name}: median of {args.steps - args.skip} steps, {time.time() - began:.0f} s in all")
    for phase in PHASES:
        seconds = medians.get(f"seconds/{phase}")
        if seconds is not None:
            print(f"  {phase:10s} {seconds:8.3f} s  {100 * seconds / total:5.1f} %")
    print(f"  {'total':10s} {total:8.3f} s")
    (out / "result.json").write_text(json.dumps({"command": words, "medians": medians}, indent=1))
    timeline(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
