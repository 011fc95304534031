"""What a server reads off rows of logits (log-prob of a token, top-K with ids): one pass against a float32 log-softmax and `topk`.

    python benchmarks/vocab_rows.py            # one GPU: 2,048 rows x 151,936 as a scoring server cuts them, 256 as a decoding step has; seconds
    python benchmarks/vocab_rows.py --quick    # tiny, on any machine (both are PyTorch without a GPU)

`plain` is what SGLang 0.5.17 does: scored rows as float32 copies, log-softmax, `topk`, the token's entry; of a decoding step `topk` of the
log-probs it has. The bound is one read of the rows at the bandwidth measured in this run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import measure as m
from slime.backends.sglang_utils import vocab_rows

TOLERANCE = 4e-6  # of log-probs about 10 in size, against float64


def plain_scored(logits_RV, tokens_R, k: int):
    rows = torch.arange(len(tokens_R), device=logits_RV.device)
    log_probs_RV = torch.log_softmax(logits_RV.float()[rows], -1)
    return log_probs_RV[rows, tokens_R], *(log_probs_RV.topk(k, dim=1) if k else (None, None))


def bandwidth(rows_RV) -> float:
    """Bytes a second of a device copy (read plus write)."""
    target = torch.empty_like(rows_RV)
    return 2 * target.nbytes / (m.measure(lambda: target.copy_(rows_RV)).ms * 1e-3)


def errors(vocab: int, rows: int) -> list[dict]:
    out = []
    for dtype in (torch.bfloat16, torch.float32):
        x, tokens = (torch.randn(rows, vocab, device=m.device()) * 2.5).to(dtype), torch.randint(0, vocab, (rows,), device=m.device())
        exact = torch.log_softmax(x.double(), -1)
        found = vocab_rows.log_probs(x, tokens, 16)
        out.append({"dtype": str(dtype)[6:], "token": float((found.log_probs - exact.gather(1, tokens[:, None])[:, 0]).abs().max()),
                    "top-K": float((found.values - exact.topk(16, dim=-1).values).abs().max()),
                    "at its ids": float((found.values - exact.gather(1, found.ids)).abs().max())})
    return out


def timed(kind: str, rows: int, vocab: int, ks: tuple[int, ...]) -> list[dict]:
    """kind: "scored" (bf16 logits) or "decoded" (float32 log-probs)."""
    x = torch.randn(rows, vocab, device=m.device()) * 2.5
    x = x.bfloat16() if kind == "scored" else torch.log_softmax(x, -1)
    tokens = torch.randint(0, vocab, (rows,), device=m.device())
    bound, out = x.nbytes / bandwidth(x) * 1e3, []
    for k in ks:
        ways = {
            "ours": (lambda k=k: vocab_rows.log_probs(x, tokens, k)) if kind == "scored" else (lambda k=k: vocab_rows.largest(x, k)),
            "plain": (lambda k=k: plain_scored(x, tokens, k)) if kind == "scored" else (lambda k=k: x.topk(k, dim=-1)),
        }
        cost = {name: m.measure(run) for name, run in ways.items()}
        for name, c in cost.items():
            out.append({"rows": rows, "kind": kind, "K": k, "way": name, "ms": c.ms, "spread": c.spread, "extra GiB": m.gib(c.extra), "one read ms": bound,
                        "x ours": c.ms / cost["ours"].ms})
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (benchmarks/results)")
    args = parser.parse_args()
    vocab, scored, decoded = (5000, 8, 4) if args.quick else (151_936, 2048, 256)
    tables = {"errors": errors(vocab, scored), "time": timed("scored", scored, vocab, (0, 16, 64)) + timed("decoded", decoded, vocab, (16, 64))}
    for name, rows in tables.items():
        print(f"\n{name}\n{m.table(rows)}")
    bad = [row for row in tables["errors"] for name in ("token", "top-K", "at its ids") if not row[name] <= TOLERANCE]
    verdict = {f"log-probs within {TOLERANCE} of float64": not bad}
    print("\n" + "\n".join(f"{'met ' if ok else 'MISSED'}  {what}" for what, ok in verdict.items()))
    print("written:", m.write("vocab_rows_quick" if args.quick else "vocab_rows", {"tables": tables, "verdict": verdict}, args.out).name)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
