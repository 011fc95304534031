"""What a training step must hold and compute, counted from the model's shape, beside what was recorded on a GPU.

    python benchmarks/step_account.py              # Qwen3-1.7B shape, 10 % kept; recorded peaks from results/
    python benchmarks/step_account.py --trace      # also: every tensor of the trainer's own step on a small model, on the CPU

bf16 weights, f32 gradient buffers, full recompute of one layer at a time, tied embedding, no optimizer. The peak is the larger of two moments:
  head    the loss of the needed rows is done: all checkpoints, a chunk of logits and the gradient of the head
  layer   the backward pass of one layer: all checkpoints and what one layer keeps
The trace counts live tensors after every operation (torch's dispatcher), so memory inside a kernel is not seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "slime_ta_opd")]

from benchmarks import measure as m
from benchmarks.reference_trunk import QWEN3_1_7B, Shape

KEPT, LENGTH, PROMPT, CHUNK_BYTES = 0.10, 4096, 256, 512 << 20
WAYS = {  # name: (rows are kept, plain loss, last layer's rows, gated MLP and tied gradient as autograd keeps them)
    "all, plain": (False, True, "all", True),
    "kept, as recorded": (True, False, "mlp", True),  # the last layer's MLP on kept rows
    "kept, today": (True, False, "kept", False),
}


def parameters(s: Shape) -> dict[str, int]:
    """Numbers of parameters: of the embedding, of one layer's parts, of all."""
    qkv, proj, mlp = s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim * s.hidden, 3 * s.hidden * s.ffn
    layer = qkv + proj + mlp + 2 * s.hidden + 2 * s.head_dim
    return {"embedding": s.vocab * s.hidden, "layer": layer, "all": s.vocab * s.hidden + s.layers * layer + s.hidden}


def num_rows(tokens: int, kept: bool) -> int:
    """Rows of the loss: a share of the tokens, or every response position."""
    return int(tokens * KEPT) if kept else tokens - tokens // LENGTH * (PROMPT - 1)


def layer_bytes(s: Shape, autograd_mlp: bool) -> float:
    """Bytes a token that the backward pass of one recomputed layer holds at its peak, checkpoints aside (bf16)."""
    q, kv, h, f = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.hidden, s.ffn
    attention = h + (q + 2 * kv) + q + q + kv + kv + q  # norm, joint projection, queries, rotated q and k, values, output
    ends = 2 * h + 2 * h  # output and its gradient; hidden states between the halves and their norm
    mlp = 2 * f + f + f  # both projections, silu(gate), product, and going back:
    back = 2 * f if autograd_mlp else 0  # two gradients beside that of the product, which takes the product's place
    return 2.0 * (attention + ends + (mlp if autograd_mlp else mlp - f) + back)


def account(s: Shape, tokens: int, kept: bool, plain: bool, autograd: bool) -> dict[str, float]:
    """GiB by name, and the two moments."""
    n, rows = parameters(s), num_rows(tokens, kept)
    out = {"weights": 2 * n["all"], "gradient buffers": 4 * n["all"], "checkpoints": s.layers * tokens * s.hidden * 2}
    head = 2 * n["embedding"] + 2 * 2 * rows * s.hidden
    logits = rows * s.vocab * (2 + 4 + 4 + 2) if plain else min(CHUNK_BYTES, rows * s.vocab * 2)  # bf16, f32, log-softmax, gradient
    out |= {"head: logits": logits, "head: gradients": head}
    out["layer: kept for backward"] = tokens * layer_bytes(s, autograd)
    out["layer: gradient of the tied head"] = 2 * n["embedding"] if autograd else 0
    out = {name: value / m.GIB for name, value in out.items()}
    base = out["weights"] + out["gradient buffers"] + out["checkpoints"]
    for moment in ("head", "layer"):
        out[f"moment: {moment}"] = base + sum(v for name, v in out.items() if name.startswith(moment))
    out["peak"] = max(out["moment: head"], out["moment: layer"])
    return out


def flops(s: Shape, tokens: int, kept: bool, last: str) -> dict[str, float]:
    """TFLOP of forward, recompute and backward: layers before the last, the last one, the head."""
    rows = num_rows(tokens, kept)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    causal, masked = 4 * LENGTH / 2 * q, 4 * LENGTH * q

    def layer(query_rows: int, mlp_rows: int) -> float:
        products = 2 * s.hidden * (2 * query_rows * q + 2 * tokens * kv + 3 * mlp_rows * s.ffn)
        attention = tokens * causal if query_rows == tokens else query_rows * masked
        return 4 * products + 4.5 * attention

    own = {"all": (tokens, tokens), "mlp": (tokens, rows), "kept": (rows, rows)}[last]
    out = {"other layers": (s.layers - 1) * layer(tokens, tokens), "last layer": layer(*own), "head": 6 * rows * s.hidden * s.vocab}
    return {name: value / 1e12 for name, value in {**out, "all": sum(out.values())}.items()}


def recorded() -> dict[tuple[int, str], float]:
    """Peaks in GiB of results/loss_rows_megatron_h200.json by (tokens, way)."""
    file = m.RESULTS / "loss_rows_megatron_h200.json"
    rows = json.loads(file.read_text())["tables"]["whole step"] if file.is_file() else []
    return {(r["tokens"], r["way"]): r["peak GiB"] for r in rows}


def tables(s: Shape, sizes: list[int]) -> dict[str, list[dict]]:
    measured, memory, work = recorded(), [], []
    for tokens in sizes:
        every = account(s, tokens, *WAYS["all, plain"][:2], WAYS["all, plain"][3])["peak"]
        for way, (kept, plain, last, autograd) in WAYS.items():
            known = {"all, plain": "all, plain", "kept, as recorded": "kept, ours"}.get(way)
            counted = account(s, tokens, kept, plain, autograd)
            memory.append({"tokens": tokens, "way": way, **{k: round(v, 2) for k, v in counted.items()},
                           "recorded peak": measured.get((tokens, known)), "of all": round(counted["peak"] / every, 3)})  # fmt: skip
            work.append({"tokens": tokens, "way": way, **{k: round(v, 2) for k, v in flops(s, tokens, kept, last).items()}})
    return {"GiB": memory, "TFLOP": work}


class Live(TorchDispatchMode):
    """Bytes of tensors made inside the block that are alive: now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage not in self._seen and not any(a is x for a in args):
                    self._seen[storage] = size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


TRACED = Shape(layers=4, hidden=256, ffn=768, heads=2, kv_heads=1, head_dim=128, vocab=4000)


def trace(tokens: int = 4096, length: int = 512) -> list[dict]:
    """Peak of live tensors of the trainer's own step on kept rows above weights and gradient buffers, bf16, on this machine."""
    from megatron.core.transformer.mlp import MLP

    from benchmarks.megatron_step import one_rank, step_batch, stepper_of
    from slime.backends.megatron_utils.last_layer import GatedMLP
    from slime.backends.megatron_utils.losses.registry import get_loss
    from slime.backends.megatron_utils.model import unwrap

    out = []
    checkpoints = TRACED.layers * tokens * TRACED.hidden * 2
    with one_rank(TRACED, tokens, bf16=True) as (model, settings, device):
        data = step_batch(TRACED, tokens, length, KEPT)
        for mlp, last in ((MLP, "all"), (MLP, "mlp"), (GatedMLP, "mlp"), (GatedMLP, "kept")):
            for layer in unwrap(model).decoder.layers:
                layer.mlp.__class__ = mlp
            stepper = stepper_of(model, settings, get_loss("sampled_reverse_kl"), device, opd_last_layer_rows=last)
            model.zero_grad_buffer()
            with Live() as live:
                stepper.gradients(data, data["steps"][0])
            out.append({"MLP": "by autograd" if mlp is MLP else "ours", "last layer": last, "peak MiB": live.peak / 2**20,
                        "bytes a token above checkpoints": (live.peak - checkpoints) / tokens,
                        "counted": layer_bytes(TRACED, mlp is MLP)})  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (benchmarks/results)")
    args = parser.parse_args()
    found = tables(QWEN3_1_7B, args.tokens)
    if args.trace:
        found["trace"] = trace()
    for name, rows in found.items():
        print(f"\n{name}\n{m.table(rows)}")
    print("written:", m.write("step_account", {"kept": KEPT, "tables": found}, args.out).name)


if __name__ == "__main__":
    main()
