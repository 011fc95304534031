"""The optimizer's step with its state on the device and in host memory (--optimizer-cpu-offload), in one run.

    python benchmarks/optimizer_step.py                   # the trainer's optimizer at Qwen3-1.7B shape on a GPU
    python benchmarks/optimizer_step.py --quick           # tiny, on any machine

Each way is the trainer's own optimizer over megatron-core's gradient buffers, with the same drawn weights and gradients; a step is the
gradient's norm, clipping and AdamW. After the timed steps weights are compared, bit by bit. `extra GiB`: a step's peak above what
is held between steps (weights, gradient buffers and, on the device, the state).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "slime_ta_opd")]

import torch  # noqa: E402

from benchmarks import measure as m  # noqa: E402
from benchmarks.reference_trunk import QWEN3_1_7B, TINY, Shape  # noqa: E402

WAYS = {"device": False, "host": True}
TARGETS = {"peak_gib": 11.0, "seconds": 0.6}


def one_way(s: Shape, way: str, grads: str, repeats: int, chunk_bytes: int | None) -> tuple[dict, list[torch.Tensor]]:
    """A row of numbers, and the weights after all steps (on the host)."""
    from benchmarks.megatron_step import one_rank
    from slime.backends.megatron_utils import cpu_runtime, host_state
    from slime.backends.megatron_utils.optimizer import Optimizer

    cuda = torch.cuda.is_available()
    whole, host_state.CHUNK_BYTES = host_state.CHUNK_BYTES, chunk_bytes or host_state.CHUNK_BYTES
    try:
        with one_rank(s, 1024, bf16=True, grads_in_fp32=grads == "fp32") as (model, settings, device), cpu_runtime.cpu_runtime():
            began = time.perf_counter()
            optimizer = Optimizer(model, replace(settings, optimizer_cpu_offload=WAYS[way], lr=1e-3, clip_grad=0.5))
            built = time.perf_counter() - began
            drawn = torch.Generator(device=device).manual_seed(1)

            def draw():
                for p in model.parameters():
                    p.main_grad.normal_(generator=drawn)

            held = torch.cuda.memory_allocated() if cuda else None
            cost = m.measure(lambda: optimizer.apply(optimizer.grad_norm()), before=draw, repeats=repeats)
            row = {"gradients": grads, "state": way, "ms": cost.ms, "spread": cost.spread, "held GiB": m.gib(held), "extra GiB": m.gib(cost.extra),
                   "peak GiB": m.gib(cost.peak), "host GiB": m.gib(sum(h.nbytes for h in optimizer.host.values())), "built s": built,
                   "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
            weights = [p.detach().cpu().clone() for p in model.parameters()]
            optimizer.free()
            model.grad_accs.clear()  # hooks that the collector cannot see: see MegatronTrainer.free
            for p in model.parameters():
                vars(p).pop("main_param", None)
    finally:
        host_state.CHUNK_BYTES = whole
    return row, weights


def compared(s: Shape, grads: str, repeats: int, chunk_bytes: int | None) -> tuple[list[dict], dict]:
    """Rows of both ways and what they say of each other."""
    found = {}
    for way in WAYS:
        found[way] = one_way(s, way, grads, repeats, chunk_bytes)
        m.free()
    (device, here), (host, there) = found["device"], found["host"]
    moved = 2 * host["host GiB"] * m.GIB / (host["ms"] * 1e-3) / 1e9
    different = sum(int((a != b).sum()) for a, b in zip(here, there, strict=True))
    worst = max(m.relative_error(b, a) for a, b in zip(here, there, strict=True))
    ratio = {"gradients": grads, "host over device": host["ms"] / device["ms"], "more ms": host["ms"] - device["ms"], "GB/s both ways": moved,
             "less GiB": None if device["peak GiB"] is None else device["peak GiB"] - host["peak GiB"],
             "different weights": different, "worst error": worst}  # fmt: skip
    return [device, host], ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--gradients", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="dtype of the gradient buffers")
    parser.add_argument("--chunk-mib", type=float, help="of state in one chunk; default: the trainer's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the JSON file (benchmarks/results)")
    args = parser.parse_args()
    s, repeats = (TINY, 2) if args.quick else (QWEN3_1_7B, args.repeats)
    chunk = int(args.chunk_mib * 2**20) if args.chunk_mib else 2**14 if args.quick else None
    tables: dict[str, list[dict]] = {"steps": [], "ratios": []}
    for grads in args.gradients:
        rows, ratio = compared(s, grads, repeats, chunk)
        tables["steps"] += rows
        tables["ratios"].append(ratio)
    for name, rows in tables.items():
        print(f"\n{name}\n{m.table(rows)}")
    verdict = {"weights equal, bit by bit (bf16 gradients on a GPU: within bf16)": all(
        r["different weights"] == 0 or (r["gradients"] == "bf16" and torch.cuda.is_available() and r["worst error"] < 1e-3) for r in tables["ratios"])}
    if torch.cuda.is_available() and not args.quick:
        host = next(r for r in tables["steps"] if r["state"] == "host")
        verdict |= {f"at most {TARGETS['peak_gib']} GiB at the step's peak": host["peak GiB"] <= TARGETS["peak_gib"],
                    f"at most {TARGETS['seconds']} s": host["ms"] <= 1e3 * TARGETS["seconds"]}  # fmt: skip
    print("\n" + "\n".join(f"{'met ' if ok else 'MISSED'}  {what}" for what, ok in verdict.items()))
    print("written:", m.write("optimizer_step_quick" if args.quick else "optimizer_step", {"tables": tables, "verdict": verdict}, args.out).name)
    return 0 if next(iter(verdict.values())) else 1


if __name__ == "__main__":
    raise SystemExit(main())
