"""The LM head and loss on kept rows, on all rows, and as others do it: time, memory, error; alone and in a whole model step.

    python benchmarks/loss_rows.py --part head                       # one H200: LM head and loss alone
    python benchmarks/loss_rows.py --part step --tokens 16384 32768   # whole steps of a plain PyTorch trunk
    python benchmarks/loss_rows.py --part step --trunk megatron      # whole steps of the trainer
    python benchmarks/loss_rows.py --quick               # tiny, on any machine

Qwen3-1.7B shape (hidden 2,048, vocabulary 151,936, 28 layers, tied), bf16, packed sequences of 4,096, full recompute, random weights and
rows. The loss is the sampled-token one unless said. Ways:
  plain      logits of the rows, f32 log-softmax, autograd
  chunked    the same in chunks of 2,048 rows that are recomputed in the backward pass
  ours       losses.linear_head, gradients made in the forward pass
  ours, 4 products   the same without known row factors: backward recomputes the logits
"extra" is the peak above inputs and weights, less the gradients of hidden and weight, which every way must deliver;
"with gradients" includes them. "peak" in whole steps is everything, weights included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import measure as m
from benchmarks.reference_trunk import QWEN3_1_7B, TINY, Shape, Trunk
from slime.backends.megatron_utils.losses import softmax_ops
from slime.backends.megatron_utils.losses.registry import get_loss
from slime.backends.megatron_utils.losses.types import Rows

KEPT = 0.10
TARGETS = {"head_ms": 6.5, "head_extra_gib": 0.7, "faster_than_all": 1.10, "of_its_peak": 0.30, "faster_than_chunked": 1.14}
TOLERANCE = 1.5e-2
CHUNK = 2048


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def make_rows(num: int, vocab: int, k: int = 16) -> Rows:
    g = torch.Generator().manual_seed(1)
    teacher = torch.log_softmax(torch.randn(num, 4 * k, generator=g) * 3, 1).topk(k, 1).values
    ids = torch.rand(num, vocab if vocab < 4096 else 4096, generator=g).topk(k, 1).indices
    logp = -torch.rand(num, generator=g) * 5
    rows = Rows(target_R=torch.randint(0, vocab, (num,), generator=g), student_logp_old_R=logp, teacher_logp_R=logp + 0.5,
                factor_R=torch.full((num,), 1.0 / num), teacher_ids_RK=ids, teacher_logps_RK=teacher)
    for name, value in vars(rows).items():
        if value is not None:
            setattr(rows, name, value.to(m.device()))
    return rows


def policy_loss(logits_RV, target_R, old_R, teacher_R) -> torch.Tensor:
    logp_R = torch.log_softmax(logits_RV.float(), -1).gather(1, target_R[:, None])[:, 0]
    advantage_R = teacher_R - old_R
    ratio_R = (logp_R - old_R).exp()
    return torch.maximum(-advantage_R * ratio_R, -advantage_R * ratio_R.clamp(0.8, 1.2))


def plain(hidden_RH, weight_VH, rows: Rows) -> torch.Tensor:
    loss_R = policy_loss(hidden_RH @ weight_VH.t(), rows.target_R, rows.student_logp_old_R, rows.teacher_logp_R)
    return (loss_R * rows.factor_R).sum()


def chunked(hidden_RH, weight_VH, rows: Rows) -> torch.Tensor:
    def part(h, target, old, teacher):
        return policy_loss(h @ weight_VH.t(), target, old, teacher)

    pieces = zip(*(x.split(CHUNK) for x in (hidden_RH, rows.target_R, rows.student_logp_old_R, rows.teacher_logp_R)), strict=True)
    return (torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]) * rows.factor_R).sum()


def ours(hidden_RH, weight_VH, rows: Rows, name: str = "sampled_reverse_kl", known: bool = True, chunk: int | None = None):
    args = SimpleNamespace(eps_clip=0.2, loss_chunk_rows=chunk)
    if known:
        return get_loss(name)(hidden_RH, weight_VH, rows, args).total
    free = Rows(**{**vars(rows), "factor_R": None})
    return (get_loss(name)(hidden_RH, weight_VH, free, args).loss_R * rows.factor_R).sum()


WAYS = {
    "plain": plain,
    "chunked": chunked,
    "ours": ours,
    "ours, chunks of 384": lambda h, w, r: ours(h, w, r, chunk=384),
    "ours, 4 products": lambda h, w, r: ours(h, w, r, known=False),
    "ours, topk_reverse_kl": lambda h, w, r: ours(h, w, r, "topk_reverse_kl"),
    "ours, full_reverse_kl": lambda h, w, r: ours(h, w, r, "full_reverse_kl"),
}


class Head:
    """Inputs of the LM head alone, gradients dropped between calls."""

    def __init__(self, num_rows: int, s: Shape, teacher_hidden: int):
        g = torch.Generator(device=m.device()).manual_seed(0)

        def normal(*shape, scale):
            return (torch.randn(*shape, generator=g, device=m.device()) * scale).to(dtype())

        self.hidden, self.weight = normal(num_rows, s.hidden, scale=1.0), normal(s.vocab, s.hidden, scale=2.5 / s.hidden**0.5)
        self.rows = make_rows(num_rows, s.vocab)
        if teacher_hidden:
            self.rows.teacher_hidden_RH = normal(num_rows, teacher_hidden, scale=1.0)
            self.rows.teacher_weight_VH = normal(s.vocab, teacher_hidden, scale=2.5 / teacher_hidden**0.5)
        with torch.no_grad():  # ratios of new to old policy as on fresh rollouts
            stats = get_loss("sampled_reverse_kl")(self.hidden, self.weight, self.rows, SimpleNamespace()).stats
        noise = torch.randn(2, num_rows, generator=g, device=m.device())
        self.rows.student_logp_old_R = stats["student_logp"] + 0.1 * noise[0]
        self.rows.teacher_logp_R = self.rows.student_logp_old_R + noise[1]
        self.hidden.requires_grad_(), self.weight.requires_grad_()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def step(self, way: str) -> None:
        WAYS[way](self.hidden, self.weight, self.rows).backward()

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))


def check(s: Shape, num_rows: int, teacher_hidden: int) -> list[dict]:
    """Errors against f32 autograd on the same values; memory poisoned before each way."""
    head, out = Head(num_rows, s, teacher_hidden), []
    exact_h, exact_w = (x.detach().float().requires_grad_() for x in (head.hidden, head.weight))
    expected = plain(exact_h, exact_w, head.rows)
    expected.backward()
    size = float((head.rows.teacher_logp_R - head.rows.student_logp_old_R).abs().mean())  # of a row's loss
    for way in ("plain", "chunked", "ours", "ours, chunks of 384", "ours, 4 products"):
        head.clear()
        m.poison(4 << 30)
        total = WAYS[way](head.hidden, head.weight, head.rows)
        total.backward()
        out.append({"way": way, "total error": float((total - expected).detach().abs()) / size,
                    "hidden gradient error": m.relative_error(head.hidden.grad, exact_h.grad),
                    "weight gradient error": m.relative_error(head.weight.grad, exact_w.grad)})
    return out


def head_alone(s: Shape, tokens: int, teacher_hidden: int) -> list[dict]:
    out = []
    for share in (KEPT, 1.0):
        num = int(tokens * share)
        head = Head(num, s, teacher_hidden if share < 1 else 0)
        roomy = not torch.cuda.is_available() or share < 1 or torch.cuda.mem_get_info()[0] > 40 * m.GIB
        for way in WAYS:
            if ("full" in way and head.rows.teacher_hidden_RH is None) or (way == "plain" and not roomy):
                continue
            if share == 1.0 and way in ("ours, chunks of 384", "ours, topk_reverse_kl"):
                continue
            head.clear()
            m.free()
            cost = m.measure(lambda w=way, h=head: h.step(w), before=head.clear)
            extra = None if cost.extra is None else cost.extra - head.gradient_bytes
            out.append({"rows": num, "way": way, "ms": cost.ms, "spread": cost.spread, "extra GiB": m.gib(extra),
                        "with gradients GiB": m.gib(cost.extra)})
        del head
        m.free()
    ours_kept = next(r["ms"] for r in out if r["way"] == "ours")
    for row in out:
        row["x ours kept"] = row["ms"] / ours_kept
    return out


def parts(s: Shape, num: int) -> list[dict]:
    """What `ours` on kept rows is made of; the three products are the arithmetic floor."""
    head = Head(num, s, 0)
    h, w = head.hidden.detach(), head.weight.detach()
    logits = h @ w.t()
    row = torch.ones(num, device=h.device)
    half = w.shape[0] // 2
    work = {  # name: (products, counted in the floor, what)
        "logits = hidden x weight'": (1, True, lambda: torch.mm(h, w.t(), out=logits)),
        "gradient of hidden = g x weight": (1, True, lambda: torch.mm(logits, w)),
        "the same, vocabulary in two halves": (1, False, lambda: torch.mm(logits[:, :half], w[:half]).addmm_(logits[:, half:], w[half:])),
        "gradient of weight = g' x hidden": (1, True, lambda: torch.mm(logits.t(), h)),
        "softmax statistics": (0, False, lambda: softmax_ops.row_stats(logits)),
        "gradient in place": (0, False, lambda: softmax_ops.softmax_scale_(logits, row, row)),
    }
    out, floor = [], 0.0
    for name, (products, counted, run) in work.items():
        torch.mm(h, w.t(), out=logits)
        cost = m.measure(run)
        out.append({"part": name, "ms": cost.ms, "TFLOP/s": 2 * num * w.numel() / cost.ms / 1e9 if products else None})
        floor += cost.ms if counted else 0.0
    return [*out, {"part": "three products", "ms": floor, "TFLOP/s": 6 * num * w.numel() / floor / 1e9}]


STEPS = {  # name: (share of rows, way, rows selected inside the last layer)
    "all, plain": (1.0, "plain", False),
    "all, chunked": (1.0, "chunked", False),
    "all, ours": (1.0, "ours", False),
    "kept, plain": (KEPT, "plain", False),
    "kept, ours": (KEPT, "ours", False),
    "kept, ours, last layer on kept rows": (KEPT, "ours", True),
}


def whole_step(s: Shape, tokens: int, length: int) -> list[dict]:
    """Forward and backward of the reference trunk, head and loss."""
    torch.manual_seed(0)
    trunk = Trunk(s, m.device(), dtype())
    tokens_T = torch.randint(0, s.vocab, (tokens,), device=m.device())
    rows = {share: make_rows(int(tokens * share), s.vocab) for share in (1.0, KEPT)}
    kept_R = torch.randperm(tokens, device=m.device())[: int(tokens * KEPT)].sort().values

    def clear():
        for p in trunk.parameters():
            p.grad = None

    def step(share, way, select):
        rows_R = kept_R if share < 1 else None
        hidden = trunk(tokens_T, length, rows_R, select)
        WAYS[way](hidden, trunk.embedding, rows[share]).backward()

    out = []
    for name, what in STEPS.items():
        clear()
        m.free()
        try:
            cost = m.measure(lambda w=what: step(*w), before=clear, warmup=1, repeats=3)
        except torch.cuda.OutOfMemoryError:
            out.append({"tokens": tokens, "trunk": "torch", "way": name, "ms": None, "peak GiB": None})
            continue
        out.append({"tokens": tokens, "trunk": "torch", "way": name, "ms": cost.ms, "spread": cost.spread, "peak GiB": m.gib(cost.peak)})
    return out


def ratios(steps: list[dict]) -> list[dict]:
    """Kept against the ways of others, in one run: how many times faster, which part of the peak."""
    out = []
    for case in dict.fromkeys((r["tokens"], r["trunk"], r.get("gradients", "bf16")) for r in steps):
        by_way = {r["way"]: r for r in steps if (r["tokens"], r["trunk"], r.get("gradients", "bf16")) == case}
        kept = by_way.get("kept, ours, last layer on kept rows") or by_way["kept, ours"]
        for name, other in by_way.items():
            if (name.startswith("all") or "outputs" in name or "without" in name) and other["ms"] and kept["ms"]:
                out.append({**dict(zip(("tokens", "trunk", "gradients"), case, strict=True)), "kept against": name, "times faster": other["ms"] / kept["ms"],
                            "peak, part of": kept["peak GiB"] / other["peak GiB"] if kept["peak GiB"] else None})
    return out


def verdict(tables: dict[str, list[dict]]) -> dict[str, bool]:
    out = {"errors within tolerance": all(
        value <= TOLERANCE for r in tables.get("errors", []) if r["way"].startswith("ours") for k, value in r.items() if k.endswith("error"))}
    if not torch.cuda.is_available():
        return out
    if "head alone" in tables:
        r = next(r for r in tables["head alone"] if r["way"] == "ours")  # the kept rows come first
        out[f"head at 10 % of the rows: at most {TARGETS['head_ms']} ms"] = r["ms"] <= TARGETS["head_ms"]
        out[f"and {TARGETS['head_extra_gib']} GiB extra"] = r["extra GiB"] <= TARGETS["head_extra_gib"]
    for r in tables.get("ratios", []):
        where = f"{r['trunk']} trunk, {r['tokens']} tokens, gradients in {r['gradients']}: kept "
        if r["kept against"] == "all, plain":
            out[f"{where}{TARGETS['faster_than_all']} x faster than all"] = r["times faster"] >= TARGETS["faster_than_all"]
            out[f"{where}at most {TARGETS['of_its_peak']} of its peak"] = r["peak, part of"] <= TARGETS["of_its_peak"]
        if r["kept against"] == "all, chunked":
            out[f"{where}{TARGETS['faster_than_chunked']} x faster than chunked"] = r["times faster"] >= TARGETS["faster_than_chunked"]
            out[f"{where}at no more memory than chunked"] = r["peak, part of"] <= 1.0
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--part", choices=("head", "step", "both"), default="both")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768], help="packed tokens of whole steps")
    parser.add_argument("--trunk", choices=("torch", "megatron"), default="torch", help="megatron: the trainer's own step")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (benchmarks/results)")
    args = parser.parse_args()
    s, tokens, length = (TINY, [256], 64) if args.quick else (QWEN3_1_7B, args.tokens, 4096)
    tables: dict[str, list[dict]] = {}
    if args.part != "step":
        tables["errors"] = check(s, 64 if args.quick else 512, 0)
        m.free()
        tables["head alone"] = head_alone(s, tokens[0], 48 if args.quick else 2560)
        m.free()
        tables["parts"] = parts(s, int(tokens[0] * KEPT))
        m.free()
    if args.part != "head":
        if args.trunk == "megatron":
            from benchmarks.megatron_step import megatron_steps

            tables["whole step"] = megatron_steps(s, tokens, length)
        else:
            tables["whole step"] = [row for n in tokens for row in whole_step(s, n, length)]
        tables["ratios"] = ratios(tables["whole step"])
    for name, rows in tables.items():
        print(f"\n{name}\n{m.table(rows)}")
    found = verdict(tables)
    print("\n" + "\n".join(f"{'met ' if ok else 'MISSED'}  {what}" for what, ok in found.items()))
    name = "loss_rows" + ("_quick" if args.quick else "") + (f"_{args.trunk}" if args.part == "step" else f"_{args.part}")
    print("written:", m.write(name, {"kept": KEPT, "tables": tables, "verdict": found}, args.out).name)
    return 0 if found["errors within tolerance"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
