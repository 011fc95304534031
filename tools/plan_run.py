"""What a run will cost, before it starts: seconds and memory by phase, and the best use of a number of GPUs.

  plan_run.py --student 1.7B --teacher 4B --gpus 1
  plan_run.py --student 8B --teacher 235B-A22B --gpus 256 --response-len 16384 --response-mean 8000 --prompts 512 --samples 2
  plan_run.py --student HF_DIR --teacher HF_DIR/config.json --gpu H100 --gpus 8 --json

Rates come from benchmarks/results/rates.json; --sources says which are measured, calibrated or assumed. Needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from slime.planning.layout import MODES, SEARCHED, Layout, Servers, Split
from slime.planning.models import load_model
from slime.planning.predict import PHASES, Machine, Prediction, Task, predict
from slime.planning.rates import load_rates
from slime.planning.render import ROW_HEAD, as_dict, flags, markdown_limits, markdown_row, show
from slime.planning.search import best_plan
from slime.planning.workload import CUTS, Workload
from ta_opd.errors import ConfigError, DataError, TaOpdError

# Topologies of benchmarks/gpu/opd_step.py: mode, trainer, servers of either role.
TOPOLOGIES = {
    "one": ("colocated", Layout(), Servers(1, 1)), "apart": ("servers apart", Layout(), Servers(1, 1)),
    "tp2": ("colocated", Layout(tp=2), Servers(2, 1)), "four": ("colocated", Layout(tp=2, dp=2), Servers(4, 1)),
}  # fmt: skip
RATES = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "rates.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    model = "HF directory, config.json, a known size (1.7B, 235B-A22B) or a dense count (3B)"
    add("--student", required=True, help=model)
    add("--teacher", required=True, help=model)
    add("--gpus", type=int, required=True, help="GPUs there are; the plan may use fewer")
    add("--gpu", default="H200", help="kind of GPU in the file of rates")
    add("--gpus-per-node", type=int, default=8)
    add("--gpu-memory-gib", type=float, help="instead of the kind's")
    add("--matmul-tflops", type=float, help="instead of the kind's: bf16 matrix products as measured")
    add("--bandwidth-tbps", type=float, help="instead of the kind's: memory, TB/s")
    add("--nvlink-gbps", type=float, help="instead of the kind's: GB/s one way a GPU")
    add("--network-gbps", type=float, help="instead of the kind's: GB/s one way a GPU, between nodes")
    add("--prompts", type=int, default=64, help="prompts a rollout")
    add("--samples", type=int, default=4, help="responses a prompt")
    add("--prompt-len", type=int, default=256)
    add("--response-len", type=int, default=1024, help="longest response")
    add("--response-mean", type=float, help="mean response; default: all are of the longest length")
    add("--k", type=int, default=16, help="K of top-k")
    add("--budget", type=float, default=0.10, help="share of tokens kept")
    add("--cut", choices=CUTS, default="even", help="where kept tokens lie in a response: the trainer cuts after the last one")
    add("--loss-rows", choices=("kept", "all"), default="kept")
    add("--optimizer-steps", type=int, default=1, help="optimizer steps a rollout")
    add("--no-recompute", action="store_true", help="keep activations instead of computing them again")
    add("--optimizer-cpu-offload", action="store_true", help="the optimizer's state in host memory")
    add("--no-bank", action="store_true", help="no token bank")
    add("--score-after-generation", action="store_true", help="no overlap of scoring with generation")
    add("--asynchronous", action="store_true", help="train_async.py: the next rollout is made while this one trains")
    add("--max-tokens-per-gpu", type=int, help="default: the largest micro-batch that fits")
    add("--student-concurrency", type=int, default=256, help="responses at once in one engine, at most")
    add("--graph-batch", type=int, default=256, help="largest batch with a CUDA graph")
    add("--mode", choices=MODES, help="only plans of this kind")
    add("--layout", metavar="TP,PP,CP,DP", help="this trainer; predicts one plan instead of searching (with --mode)")
    add("--student-servers", metavar="COUNTxTP", default="1x1", help="with --layout")
    add("--teacher-servers", metavar="COUNTxTP", default="1x1", help="with --layout")
    add("--rates", type=Path, default=RATES, help="file of rates")
    add("--sources", action="store_true", help="also print where every rate comes from")
    add("--compare", type=Path, metavar="RESULT", help="result.json of benchmarks/gpu/opd_step.py: its seconds beside the predicted ones")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


def task_of(args) -> Task:
    rates = load_rates(args.rates)
    gpu = rates.gpu(args.gpu).with_values(
        memory=args.gpu_memory_gib and args.gpu_memory_gib * 2**30, matmul=args.matmul_tflops and args.matmul_tflops * 1e12,
        bandwidth=args.bandwidth_tbps and args.bandwidth_tbps * 1e12, nvlink=args.nvlink_gbps and args.nvlink_gbps * 1e9,
        network=args.network_gbps and args.network_gbps * 1e9,
    )  # fmt: skip
    work = Workload(
        prompts=args.prompts, samples=args.samples, prompt_len=args.prompt_len, response_len=args.response_len, response_mean=args.response_mean,
        k=args.k, budget=args.budget, cut=args.cut, all_rows=args.loss_rows == "all", recompute=not args.no_recompute, optimizer_cpu_offload=args.optimizer_cpu_offload,
        optimizer_steps=args.optimizer_steps, bank=not args.no_bank, overlap=not args.score_after_generation, asynchronous=args.asynchronous, max_tokens=args.max_tokens_per_gpu,
        student_concurrency=args.student_concurrency, graph_batch=args.graph_batch,
    )  # fmt: skip
    return Task(load_model(args.student), load_model(args.teacher, served=True), work, Machine(gpu, args.gpus, args.gpus_per_node), rates)


def plan(args) -> tuple[Task, Prediction]:
    task = task_of(args)
    if not args.layout:
        return task, best_plan(task, (args.mode,) if args.mode else ("apart",) if args.asynchronous else SEARCHED)
    layout = Layout(*_numbers("--layout", args.layout, ",", 4))
    servers = (Servers(*_numbers(flag, text, "x", 2)) for flag, text in (("--student-servers", args.student_servers), ("--teacher-servers", args.teacher_servers)))
    split = Split(args.mode or "colocated", layout, *servers)
    if split.gpus > args.gpus:
        raise ConfigError(f"--layout: expected a plan of at most --gpus {args.gpus}, got one of {split.gpus}")
    return task, predict(task, split)


def compare(task: Task, prediction: Prediction, path: Path) -> list[str]:
    """Measured and predicted seconds by phase. Raises DataError on a file that opd_step.py did not write, ConfigError on one of another step."""
    try:
        result = json.loads(path.read_text())
        measured = result["seconds"]
        recorded = (result["case"], int(result["k"]), float(result["budget"]), result["topology"])
        mean = float(result["medians"]["rollout/response_length"])
        rows = {"generate": measured["sample"], **{p: measured.get(p) for p in PHASES[1:]}, "total": measured["total"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--compare {path}: expected a result.json of opd_step.py with seconds by phase ({type(error).__name__}: {error})") from error
    work, split = task.work, prediction.split
    given = (f"{work.prompts}x{work.samples}x{work.response_len}", work.k, work.budget, *(t for t, p in TOPOLOGIES.items() if _is(split, p)))
    if given != recorded:
        shown = ["{}, K {}, budget {}, topology {}".format(*step, "unknown") for step in (recorded, given)]
        raise ConfigError(f"--compare {path}: expected flags that describe its step ({shown[0]}), got {shown[1]}")
    if abs(mean / work.mean - 1) > 0.05:
        raise ConfigError(f"--compare {path}: expected its mean response, --response-mean {mean:.0f}, got {work.mean:.0f}")
    guesses, lines = {**prediction.seconds, "total": prediction.total}, [f"{'phase':10s} {'measured':>9s} {'predicted':>9s}"]
    for phase, real in rows.items():
        if real is not None:
            lines.append(f"{phase:10s} {real:9.3f} {guesses[phase]:9.3f} {f'{guesses[phase] / real - 1:+8.0%}' if real else ''}")
    return lines


def _is(split: Split, words: tuple) -> bool:
    mode, layout, servers = words
    return split.mode == mode and split.trainer == layout and split.student == split.teacher == servers


def _numbers(flag: str, text: str, separator: str, count: int) -> list[int]:
    parts = text.split(separator)
    if len(parts) != count or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"{flag}: expected {count} positive numbers joined by {separator!r}, got {text!r}")
    return [int(p) for p in parts]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        task, prediction = plan(args)
        if args.compare:
            print("\n".join(compare(task, prediction, args.compare)))
            return 0
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_dict(task, prediction), indent=1))
    elif args.markdown:
        print("\n".join([ROW_HEAD, markdown_row(task, prediction), "", "| part | seconds | share | load |", "|---|---|---|---|", *markdown_limits(task, prediction)]))
    elif importlib.util.find_spec("rich") is None:  # an environment for analysing only
        print("\n".join([ROW_HEAD, markdown_row(task, prediction), "", "flags of train.py:", " ".join(flags(task, prediction))]))
    else:
        from rich.console import Console

        show(task, prediction, Console(width=None if sys.stdout.isatty() else 140), sources=args.sources)
    return 0 if prediction.fits else 1


if __name__ == "__main__":
    sys.exit(main())
