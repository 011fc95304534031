"""Whole OPD steps of train.py at real model shapes: seconds by phase, idle share, memory, utilisation, a timeline.

    python benchmarks/gpu/random_models.py --output-dir DIR
    python benchmarks/gpu/opd_step.py --models DIR --topology one --case 64x4x1024 --budget 0.10 --output-dir OUT
    python benchmarks/gpu/opd_step.py --tiny --device cpu --output-dir OUT      # the same with tiny models, on any machine

Topologies: `one` (everything on one GPU), `apart` (trainer on one GPU, student engine and teacher on the other), `tp2` (trainer TP2
on two GPUs, both servers on each), `four` (TP2 x DP2 on four GPUs, both servers on each; take --student qwen3-4B --teacher qwen3-14B).
`--stock` runs the same step with the stock choices, by flags alone: profile released, loss on all rows, scoring after generation and of the
whole sequence, top-K as lists, the mask by a Python loop (stock_selector.py, which also checks that the kept tokens are the same).

Writes to OUT: result.json (medians, the table, memory by step, model FLOPs utilisation, the commands), trace.json (chrome://tracing),
timeline.png, and what train.py writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

from benchmarks.gpu import random_models, timeline  # noqa: E402
from benchmarks.gpu.watch import Watch  # noqa: E402
from slime.planning.models import load_model  # noqa: E402
from slime.planning.training import operations_of  # noqa: E402

PHASES = ("sample", "score", "select", "split", "train", "sync", "save", "eval")
ON_GPU = ("sample", "score", "train", "sync")
SHARED = ["--colocate", "--teacher-colocate"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
TOPOLOGIES = {
    "one": SHARED,
    "apart": [],  # the teacher's server is started here, on the engine's GPU
    "tp2": [*SHARED, "--actor-num-gpus-per-node", "2", *TP2, "--rollout-num-gpus", "2", "--teacher-num-gpus", "2"],
    "four": [*SHARED, "--actor-num-gpus-per-node", "4", *TP2, "--use-distributed-optimizer", "--rollout-num-gpus", "4", "--teacher-num-gpus", "4"],
}
GPUS = {"one": 1, "apart": 2, "tp2": 2, "four": 4}
# Shares of the memory that is free when a server starts, student before teacher (apart: the teacher first); what is left is the trainer's.
MEMORY = {"one": (0.40, 0.40), "apart": (0.70, 0.45), "tp2": (0.40, 0.40), "four": (0.40, 0.65)}
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
STOCK = ["--opd-profile", "released", "--opd-loss-rows", "all", "--score-after-generation", "--score-whole-sequence", "--topk-as-lists"]
TINY = {"case": "4x2x32", "student": "tiny", "teacher": "tiny-teacher", "max_tokens": 2048, "k": 8}
TINY_VOCABULARY, TINY_PROMPT = 512, 16


def command(args, out: Path, teacher: list[str]) -> list[str]:
    prompts, samples, length = (int(x) for x in args.case.split("x"))
    words = [
        sys.executable, str(ROOT / "slime_ta_opd" / "train.py"), "--hf-checkpoint", f"{args.models}/{args.student}", *teacher,
        "--prompt-data", f"{args.models}/prompts.jsonl", "--label-key", "label", "--rollout-shuffle",
        "--rollout-batch-size", prompts, "--n-samples-per-prompt", samples, "--rollout-max-response-len", length,
        "--num-rollout", args.steps, "--opd-topk-metrics-k", args.k, "--opd-budget-ratio", args.budget,
        "--opd-loss-type", args.loss, "--lr", "1e-6", "--max-tokens-per-gpu", args.max_tokens, "--output-dir", out, "--run-name", out.name,
        "--trace", "--no-use-tensorboard", "--opd-token-bank-dir", out / "token_bank",
        *(RECOMPUTE if args.recompute else []), *TOPOLOGIES[args.topology],
    ]  # fmt: skip
    words += ["--opd-selector-path", f"{ROOT}/benchmarks/gpu/stock_selector.py:{args.mask}"] if args.loop_mask else ["--opd-budget-mask", args.mask]
    if args.device == "cuda":
        words += ["--sglang-mem-fraction-static", args.student_memory]
        words += [] if args.topology == "apart" else ["--teacher-mem-fraction-static", args.teacher_memory]
    if args.stock:
        words += STOCK
    elif args.profile:
        words += ["--opd-profile", args.profile]
    return [str(w) for w in [*words, *args.extra]]


def start_teacher(args, out: Path):
    """The teacher's server on the engine's GPU (the second), for `apart`: (server, flags of train.py)."""
    from slime.backends.sglang_utils.server import SGLangServer

    prompts, samples, length = (int(x) for x in args.case.split("x"))
    cpu = args.device == "cpu"
    context = json.loads((args.models / args.student / "config.json").read_text())["max_position_embeddings"]  # what the run itself asks for
    settings = argparse.Namespace(device=args.device, sglang_dtype=None, rollout_batch_size=prompts, n_samples_per_prompt=samples, rollout_seed=42,
                                  teacher_mem_fraction_static=None if cpu else args.teacher_memory, request_timeout=600, sglang_host="127.0.0.1", output_dir=str(out),
                                  rollout_max_context_len=context)  # fmt: skip
    env = {"OMP_NUM_THREADS": "1"} if cpu else {"CUDA_VISIBLE_DEVICES": used_gpus(args)[1]}
    server = SGLangServer.for_run(settings, "teacher", f"{args.models}/{args.teacher}", log_file=out / "logs" / "teacher-apart.log", device_env=env)
    server.start()
    server.wait_ready(900)
    return server, ["--rm-url", f"{server.url}/generate"]


def used_gpus(args) -> list[str]:
    """Ids of the GPUs of this run: the first of those that are visible; none on CPU."""
    if args.device == "cpu":
        return []
    count = GPUS[args.topology]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count]


def prepare_tiny(args) -> None:
    """Two tiny random models and prompts under the output directory."""
    args.models = args.output_dir / "models"
    for seed, name in enumerate((args.student, args.teacher)):
        if not (args.models / name / "config.json").is_file():
            random_models.write_model(args.models / name, "tiny", seed, context=512, vocabulary=TINY_VOCABULARY)
    random_models.write_prompts(args.models / "prompts.jsonl", 64, TINY_PROMPT, 0, TINY_VOCABULARY)


def matmul_rate(device: str) -> float:
    """bf16 (f32 on CPU) matrix products, operations a second, in a process of its own so that no memory stays taken."""
    code = """
import sys, time, torch
cuda = sys.argv[1] == "cuda"
n = 8192 if cuda else 512
a = torch.randn(n, n, device=sys.argv[1], dtype=torch.bfloat16 if cuda else torch.float32)
sync = torch.cuda.synchronize if cuda else (lambda: None)
best = 0.0
for _ in range(5):
    sync(); begin = time.perf_counter()
    for _ in range(10): b = a @ a
    sync(); best = max(best, 20 * n**3 / (time.perf_counter() - begin))
print(best)
"""
    return float(subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=True).stdout)


def machine(device: str) -> dict:
    out = {"device": device, "python": sys.version.split()[0], "matmul_operations_per_second": matmul_rate(device)}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        out["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return out


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def medians(rows: list[dict]) -> dict[str, float]:
    keys = sorted({k for r in rows for k, v in r.items() if isinstance(v, (int, float))})
    return {k: statistics.median([r[k] for r in rows if r.get(k) is not None]) for k in keys if any(r.get(k) is not None for r in rows)}


def utilisation(args, m: dict[str, float], rate: float) -> dict[str, float]:
    """Of the train phase: 6 N a trained token with attention and kept rows (`useful`), and with what recompute adds (`with_recompute`)."""
    student = load_model(f"{args.models}/{args.student}")
    gpus = 1 if args.topology == "apart" else GPUS[args.topology]  # that train
    samples = m["rollout/samples"]
    done, useful = operations_of(student, m["train/tokens"], m["train/tokens"] / samples, m["train/rows"], recompute=args.recompute)
    seconds = {"phase": m["seconds/train"], "steps": m["train/step_seconds"]}
    out = {"operations_useful": useful, "operations_done": done}
    for name, value in seconds.items():
        out |= {f"useful_of_{name}": useful / value / gpus / rate, f"with_recompute_of_{name}": done / value / gpus / rate}
    return out


def summary(args, rows: list[dict], watch: Watch, host: dict) -> dict:
    """Medians over the steps after the first --skip, and what follows from them."""
    measured = rows[args.skip :]
    m = medians(measured)
    total = m["seconds/total"]
    begin, end = measured[0]["time"] - measured[0]["seconds/total"], measured[-1]["time"]
    seen = watch.between(begin, end)
    table = {phase: m[f"seconds/{phase}"] for phase in PHASES if f"seconds/{phase}" in m}
    idle = {"by_phases": statistics.median(1 - sum(r.get(f"seconds/{p}") or 0.0 for p in ON_GPU) / r["seconds/total"] for r in measured),
            "by_gpu": 1 - statistics.mean(seen["busy"]) if seen["busy"] else None}  # fmt: skip
    steps = [{"rollout_id": r["rollout_id"], "trainer_peak_gib": r.get("train/peak_memory_gib"), "trainer_gib": r.get("train/memory_gib"),
              **{k: v for k, v in watch.between(r["time"] - r["seconds/total"], r["time"]).items() if k.endswith("gib")}} for r in rows]  # fmt: skip
    held = [s["trainer_gib"] for s in steps[args.skip :] if s["trainer_gib"]]
    return {
        "case": args.case, "topology": args.topology, "budget": args.budget, "mask": args.mask, "loss": args.loss, "k": args.k,
        "stock": args.stock, "recompute": args.recompute, "student": args.student, "teacher": args.teacher, "machine": host, "seconds": {**table, "total": total},
        "select_bank_parse_share": (table.get("select", 0.0) + table.get("split", 0.0)) / total,
        "score_beyond_generation": table.get("score", 0.0) / total, "idle": idle, "utilisation": utilisation(args, m, host["matmul_operations_per_second"]),
        "trainer_peak_gib": m.get("train/peak_memory_gib"), "memory_by_step": steps,
        "memory_drift_gib": held[-1] - held[0] if held else None, "watch": seen, "medians": m, "steps": len(measured),
    }  # fmt: skip


def show(result: dict) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare GPU machine
        print(json.dumps({k: result[k] for k in ("seconds", "idle", "utilisation", "trainer_peak_gib", "memory_drift_gib")}, indent=1))
        return
    total, seconds = result["seconds"]["total"], result["seconds"]
    table = Table(title=f"{result['topology']}, {result['case']}, budget {result['budget']}{', stock' if result['stock'] else ''}: median of {result['steps']} steps")
    for name in ("phase", "seconds", "of the step"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in PHASES:
        if phase in seconds:
            table.add_row(phase, f"{seconds[phase]:.3f}", f"{seconds[phase] / total:.1%}")
    table.add_row("no GPU phase", f"{result['idle']['by_phases'] * total:.3f}", f"{result['idle']['by_phases']:.1%}")
    table.add_row("total", f"{total:.3f}", "", style="bold")
    console = Console()
    console.print(table)
    use, idle = result["utilisation"], result["idle"]["by_gpu"]
    console.print(f"train at {use['useful_of_steps']:.1%} of the matrix rate (6 N, attention, kept rows), {use['with_recompute_of_steps']:.1%} with recompute; "
                  f"trainer's peak {result['trainer_peak_gib'] or 0:.1f} GiB, drift {result['memory_drift_gib'] or 0:+.3f} GiB; "
                  f"GPU idle {'not measured' if idle is None else f'{idle:.1%}'}")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, help="directory that random_models.py wrote")
    add("--student")
    add("--teacher")
    add("--topology", choices=TOPOLOGIES, default="one")
    add("--case", help="prompts x samples x response tokens; default 64x4x1024, the released launcher's is 4x2x64")
    add("--budget", default="0.10")
    add("--mask", default="entropy", help="with random weights C is 0, so that rules made of it keep the first tokens; entropy spreads them")
    add("--loss", default="topk_reverse_kl")
    add("--k", type=int)
    add("--profile", choices=("paper", "released"))
    add("--steps", type=int, default=4)
    add("--skip", type=int, default=1, help="first steps left out of the medians")
    add("--max-tokens", type=int, help="of a micro-batch; default 16384")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True, help="--no-recompute: keep all activations; take --max-tokens 8192 then")
    add("--student-memory", type=float, help="share of the memory that is free when the engine starts; default by topology")
    add("--teacher-memory", type=float, help="the same of the teacher's server")
    add("--stock", action="store_true", help="the stock choices, by flags")
    add("--loop-mask", action=argparse.BooleanOptionalAction, help="mask by the Python loop; default with --stock")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="tiny models made on the spot")
    add("--dry-run", action="store_true", help="print the command of train.py and stop")
    add("--output-dir", type=Path, required=True)
    add("extra", nargs="*", help="after --: further flags of train.py")
    args = parser.parse_args(argv)
    defaults = TINY if args.tiny else {"case": "64x4x1024", "student": "qwen3-1.7B", "teacher": "qwen3-4B", "max_tokens": 16384, "k": 16}
    defaults |= dict(zip(("student_memory", "teacher_memory"), MEMORY[args.topology], strict=True))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.loop_mask is None:
        args.loop_mask = args.stock
    sizes = args.case.split("x")
    if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        parser.error(f"--case: expected PROMPTSxSAMPLESxTOKENS, got {args.case!r}")
    if args.models is None and not args.tiny:
        parser.error("--models: expected the directory that random_models.py wrote (or --tiny)")
    if not 0 <= args.skip < args.steps:
        parser.error(f"--skip: expected fewer than --steps {args.steps}, got {args.skip}")
    args.output_dir = args.output_dir.absolute()
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    out = args.output_dir
    if args.dry_run:
        print(shlex.join(command(args, out, ["--teacher-model", f"{args.models}/{args.teacher}"])))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        prepare_tiny(args)
    host, server = machine(args.device), None
    teacher = ["--teacher-model", f"{args.models}/{args.teacher}"]
    env = {**os.environ, "STOCK_CHECK": str(out / "stock_check.json")} | {"CUDA_VISIBLE_DEVICES": ",".join(used_gpus(args))}
    began = time.time()
    try:
        if args.topology == "apart":
            server, teacher = start_teacher(args, out)
        words = command(args, out, teacher)
        with Watch(used_gpus(args)) as watch:
            code = subprocess.call(words, cwd=ROOT / "slime_ta_opd", env=env)
    finally:
        if server is not None:
            server.stop()
    if code:
        return code
    rows = read_rows(out)
    result = {"command": [Path(sys.argv[0]).name, *(argv or sys.argv[1:])], "train_command": words, "wall_seconds": time.time() - began, **summary(args, rows, watch, host)}
    check = out / "stock_check.json"
    if check.is_file():
        result["stock_check"] = json.loads(check.read_text())
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{args.student} from {args.teacher}, {args.topology}, {args.case}, budget {args.budget}{', stock choices' if args.stock else ''}"
    timeline.draw(timeline.spans_of(out / "trace.json", rows), watch.samples, out / "timeline.png", title)
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
