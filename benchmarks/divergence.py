"""Full-vocabulary divergences of logits that exist: time, extra memory and error, forward and backward.

    python benchmarks/divergence.py            # one H200 or H100: 4,096 and 16,384 rows x 151,936, bf16; under a minute
    python benchmarks/divergence.py --quick    # tiny, on any machine

`ours` is `losses.full.divergence_from_logits(..., overwrite=True)`: the gradient replaces the student's logits. `plain` is the same
divergence written in PyTorch (f32 log-softmaxes, autograd). Each timed call starts from fresh student logits, copied outside the
timed region. Extra memory is the peak above both logit tensors; plain's gradient counts as extra, ours needs none. The bound is
three reads of both tensors at the bandwidth measured in this run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import measure as m
from slime.backends.megatron_utils.losses import softmax_ops
from slime.backends.megatron_utils.losses.exact_stats import exact_stats
from slime.backends.megatron_utils.losses.full import KINDS, divergence_from_logits

TARGETS = {"ms": 12.0, "extra_gib": 1.5, "rows": 16_384}
TOLERANCE = {"loss": 2e-3, "grad": 8e-3}  # norms; the gradient is written in bf16
BETA = 0.5


def plain(student_RV, teacher_RV, kind: str) -> torch.Tensor:
    """The divergence of each row by log-softmaxes in f32, differentiated by autograd."""
    s, t = torch.log_softmax(student_RV.float(), -1), torch.log_softmax(teacher_RV.float(), -1)
    if kind == "reverse_kl":
        return torch.nn.functional.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    if kind == "forward_kl":
        return torch.nn.functional.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    mixture = torch.logsumexp(torch.stack([t + math.log(BETA), s + math.log(1 - BETA)]), 0)
    student = torch.nn.functional.kl_div(mixture, s, reduction="none", log_target=True).sum(-1)
    teacher = torch.nn.functional.kl_div(mixture, t, reduction="none", log_target=True).sum(-1)
    return BETA * teacher + (1 - BETA) * student


def logits(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """bf16 logits about as peaked as a language model's, made in blocks."""
    g = torch.Generator(device=m.device()).manual_seed(seed)
    out = torch.empty(rows, vocab, dtype=torch.bfloat16, device=m.device())
    for block in out.split(1024):
        block.copy_(torch.randn(block.shape, generator=g, device=block.device) * 2.5)
    return out


class Case:
    """Two logit tensors, and the way back to them after the student's were overwritten."""

    def __init__(self, rows: int, vocab: int):
        self.pristine, self.teacher = logits(rows, vocab, 0), logits(rows, vocab, 1)
        self.teacher += 0.5 * self.pristine
        self.leaf = self.pristine.clone().requires_grad_()
        self.factor = torch.full((rows,), 1.0 / rows, device=self.leaf.device)

    def restore(self) -> None:
        self.leaf.grad = None
        with torch.no_grad():
            self.leaf.copy_(self.pristine)

    def step(self, kind: str, way: str, upstream: str = "factor") -> torch.Tensor:
        """Forward and backward; with upstream "one" the gradient of the plain sum, which needs no rescaling pass."""
        if way == "plain":
            loss_R = plain(self.leaf, self.teacher, kind)
        else:
            loss_R = divergence_from_logits(self.leaf, self.teacher, kind, beta=BETA, overwrite=True)
        (loss_R.sum() if upstream == "one" else (loss_R * self.factor).sum()).backward()
        return loss_R.detach()


def check(vocab: int, rows: int) -> list[dict]:
    """Errors of both ways against f32 plain on the same bf16 logits, memory poisoned before."""
    case, out = Case(rows, vocab), []
    for kind in KINDS:
        exact = case.pristine.float().requires_grad_()
        expected = plain(exact, case.teacher.float(), kind)
        (expected * case.factor).sum().backward()
        for way in ("plain", "ours"):
            case.restore()
            m.poison(2 << 30)
            loss = case.step(kind, way)
            out.append({"kind": kind, "way": way, "loss error": m.relative_error(loss, expected),
                        "gradient error": m.relative_error(case.leaf.grad, exact.grad)})
        del exact, expected
    return out


def bandwidth(case: Case) -> float:
    """Bytes a second of a device copy (read plus write)."""
    target = torch.empty_like(case.teacher)
    cost = m.measure(lambda: target.copy_(case.teacher))
    return 2 * target.numel() * target.element_size() / (cost.ms * 1e-3)


def timed(rows: int, vocab: int, with_plain: bool) -> list[dict]:
    case, out = Case(rows, vocab), []
    bound = 3 * 2 * rows * vocab * 2 / bandwidth(case) * 1e3
    m.free()
    ways = [("ours", "factor"), ("ours", "one")] + ([("plain", "factor")] if with_plain else [])
    for kind in KINDS:
        for way, upstream in ways:
            m.free()
            cost = m.measure(lambda w=way, u=upstream, k=kind: case.step(k, w, u), before=case.restore)
            case.restore()
            out.append({"rows": rows, "kind": kind, "way": way, "upstream": upstream, "ms": cost.ms, "spread": cost.spread,
                        "extra GiB": m.gib(cost.extra), "three reads ms": bound, "x bound": cost.ms / bound})
    first = {row["kind"]: row for row in out if row["way"] == "ours" and row["upstream"] == "factor"}
    for row in out:
        row["x ours"] = row["ms"] / first[row["kind"]]["ms"]
    return out


def kernels(rows: int, vocab: int) -> list[dict]:
    """The passes alone."""
    case, out = Case(rows, vocab), []
    x, y = case.leaf.detach(), case.teacher
    stats = softmax_ops.pair_stats(x, y)
    log_x, log_y = stats.max_x + stats.sum_x.log(), stats.max_y + stats.sum_y.log()
    ones = torch.ones_like(log_x)
    work = {
        "statistics of both (2 reads)": (2, lambda: softmax_ops.pair_stats(x, y)),
        "statistics of one (1 read)": (1, lambda: softmax_ops.row_stats(x)),
        "mixture sums (2 reads)": (2, lambda: softmax_ops.jsd_sums(x, y, log_x, log_y, BETA)),
        "gradient of reverse KL (2 reads, 1 write)": (3, lambda: softmax_ops.pair_gradient_(x, y, "reverse_kl", log_x, log_y, ones, ones)),
        "rows times a factor (1 read, 1 write)": (2, lambda: softmax_ops.scale_rows_(x, ones * 0.5)),
        "rows times one": (0, lambda: softmax_ops.scale_rows_(x, ones)),
    }
    for name, (moves, run) in work.items():
        cost = m.measure(run, before=case.restore)
        out.append({"pass": name, "ms": cost.ms, "GB/s": moves * rows * vocab * 2 / (cost.ms * 1e-3) / 1e9})
    return out


def statistics(rows: int, vocab: int, hidden: int, teacher_hidden: int) -> list[dict]:
    """Exact H, KLf, KLr, C and both top-K lists from hidden states of a student and a wider teacher."""
    def normal(*shape, scale):
        return (torch.randn(*shape, device=m.device()) * scale).to(torch.bfloat16)

    student, teacher = normal(rows, hidden, scale=1.0), normal(rows, teacher_hidden, scale=1.0)
    heads = normal(vocab, hidden, scale=2 / hidden**0.5), normal(vocab, teacher_hidden, scale=2 / teacher_hidden**0.5)
    cost = m.measure(lambda: exact_stats(student, heads[0], teacher, heads[1], k=16), repeats=3)
    return [{"rows": rows, "ms": cost.ms, "us a row": cost.ms * 1e3 / rows, "extra GiB": m.gib(cost.extra)}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (benchmarks/results)")
    args = parser.parse_args()
    vocab, sizes, check_rows = (500, [64], 16) if args.quick else (151_936, [4096, 16_384], 1024)
    tables = {"errors": check(vocab, check_rows)}
    m.free()
    tables["passes"] = kernels(sizes[-1], vocab)
    m.free()
    tables["divergence"] = []
    for rows in sizes:
        roomy = not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] > 100 * m.GIB
        tables["divergence"] += timed(rows, vocab, with_plain=rows <= 4096 or roomy)
        m.free()
    tables["exact statistics"] = statistics(sizes[-1], vocab, *((32, 48) if args.quick else (2048, 2560)))
    for name, rows in tables.items():
        print(f"\n{name}\n{m.table(rows)}")
    bad = [r for r in tables["errors"] if r["way"] == "ours"
           and (not r["loss error"] <= TOLERANCE["loss"] or not r["gradient error"] <= TOLERANCE["grad"])]
    largest = [r for r in tables["divergence"] if r["rows"] == sizes[-1] and r["kind"] == "reverse_kl" and r["way"] == "ours"][0]
    verdict = {"errors within tolerance": not bad}
    if not args.quick:
        verdict |= {f"reverse KL, {TARGETS['rows']} rows: at most {TARGETS['ms']} ms": largest["ms"] <= TARGETS["ms"],
                    f"and {TARGETS['extra_gib']} GiB extra": largest["extra GiB"] is not None and largest["extra GiB"] <= TARGETS["extra_gib"]}
    print("\n" + "\n".join(f"{'met ' if ok else 'MISSED'}  {what}" for what, ok in verdict.items()))
    print("written:", m.write("divergence_quick" if args.quick else "divergence", {"tables": tables, "verdict": verdict}, args.out).name)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
