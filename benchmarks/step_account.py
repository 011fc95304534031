"""What a training step must hold and compute, counted from the model's shape, beside what was recorded on a GPU.

    python benchmarks/step_account.py              # Qwen3-1.7B shape, 10 % kept; recorded peaks from results/
    python benchmarks/step_account.py --trace      # also: every tensor of the trainer's own step on a small model, on the CPU

The ways of megatron_step.py: bf16 weights, gradient buffers in f32 or bf16, full recompute of one layer at a time, tied embedding, no
optimizer. The peak is the larger of two moments:
  head    the loss: all checkpoints, logits (plain: bf16 and three of f32 beside each other; else one chunk), gradients that are there
  layer   the backward pass of the MLP's last product in one layer: its checkpoint and those before, and what the layer keeps. On kept rows
          the last layer holds less than the one before, whose own moment comes when the last checkpoint is gone.
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
from benchmarks.loss_rows import CHUNK
from benchmarks.megatron_step import WAYS
from benchmarks.reference_trunk import QWEN3_1_7B, Shape

KEPT, LENGTH, PROMPT, CHUNK_BYTES = 0.10, 4096, 256, 512 << 20
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}


def parameters(s: Shape) -> dict[str, int]:
    """Numbers of parameters: of the embedding, of one layer's parts, of all."""
    qkv, proj, mlp = s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim * s.hidden, 3 * s.hidden * s.ffn
    layer = qkv + proj + mlp + 2 * s.hidden + 2 * s.head_dim
    return {"embedding": s.vocab * s.hidden, "layer": layer, "all": s.vocab * s.hidden + s.layers * layer + s.hidden}


def num_rows(tokens: int, kept: bool) -> int:
    """Rows of the loss: a share of the tokens, or every response position."""
    return int(tokens * KEPT) if kept else tokens - tokens // LENGTH * (PROMPT - 1)


def layer_bytes(s: Shape, autograd_mlp: bool = False) -> float:
    """Bytes a token that the backward pass of one recomputed layer holds at its peak, checkpoints aside (bf16)."""
    q, kv, h, f = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.hidden, s.ffn
    attention = h + (q + 2 * kv) + q + q + kv + kv + q  # norm, joint projection, queries, rotated q and k, values, output
    ends = h + 2 * h  # the output's gradient; hidden states between the halves and their norm
    mlp = 2 * f + f + f  # both projections; the product and its gradient
    by_autograd = 3 * f if autograd_mlp else 0  # silu(gate) and up plus 0, and one gradient more
    return 2.0 * (attention + ends + mlp + by_autograd)


def account(s: Shape, tokens: int, way: str, gradients: str = "fp32") -> dict[str, float]:
    """GiB by name, and the two moments."""
    of, loss, last = WAYS[way]
    n, rows = parameters(s), num_rows(tokens, of == "kept")
    checkpoint = tokens * s.hidden * 2
    logits = {"plain": rows * s.vocab * (2 + 4 + 4 + 2), "chunked": CHUNK * s.vocab * (2 + 4 + 4 + 2), "ours": min(CHUNK_BYTES, rows * s.vocab * 2)}
    head = 2 * 2 * rows * s.hidden + (0 if loss == "plain" else 2 * n["embedding"])  # plain: that of the matrix comes after the peak
    out = {
        "weights": 2 * n["all"], "gradient buffers": GRADIENT_BYTES[gradients] * n["all"], "checkpoints": s.layers * checkpoint,
        "head: logits": logits[loss], "head: gradients": head, "layer: kept for backward": tokens * layer_bytes(s),
        "layer: checkpoints gone": 0 if last == "all" else -checkpoint,
    }  # fmt: skip
    out = {name: value / m.GIB for name, value in out.items()}
    base = out["weights"] + out["gradient buffers"] + out["checkpoints"]
    for moment in ("head", "layer"):
        out[f"moment: {moment}"] = base + sum(v for name, v in out.items() if name.startswith(moment))
    out["peak"] = max(out["moment: head"], out["moment: layer"])
    return out


def flops(s: Shape, tokens: int, way: str) -> dict[str, float]:
    """TFLOP of forward, recompute and backward: layers before the last, the last one, the head."""
    of, loss, last = WAYS[way]
    rows = num_rows(tokens, of == "kept")
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    causal, masked = 4 * LENGTH / 2 * q, 4 * LENGTH * q

    def layer(query_rows: int, mlp_rows: int) -> float:
        products = 2 * s.hidden * (2 * query_rows * q + 2 * tokens * kv + 3 * mlp_rows * s.ffn)
        attention = tokens * causal if query_rows == tokens else query_rows * masked
        unread = 2 * s.hidden * mlp_rows * s.ffn  # recompute stops before the MLP's last product
        return 4 * products - unread + 4.5 * attention

    own = {"all": (tokens, tokens), "mlp": (tokens, rows), "kept": (rows, rows)}[last]
    out = {"other layers": (s.layers - 1) * layer(tokens, tokens), "last layer": layer(*own), "head": (8 if loss == "chunked" else 6) * rows * s.hidden * s.vocab}
    return {name: value / 1e12 for name, value in {**out, "all": sum(out.values())}.items()}


def recorded() -> dict[tuple[str, int, str], dict]:
    """Rows of results/loss_rows_megatron_h200.json by (dtype of the gradient buffers, tokens, way)."""
    file = m.RESULTS / "loss_rows_megatron_h200.json"
    found = json.loads(file.read_text()) if file.is_file() else {"tables": {"whole step": []}}
    return {(r["gradients"], r["tokens"], r["way"]): r for r in found["tables"]["whole step"]}


def tables(s: Shape, sizes: list[int]) -> dict[str, list[dict]]:
    measured, memory, work = recorded(), [], []
    for gradients in GRADIENT_BYTES:
        for tokens in sizes:
            every = account(s, tokens, "all, plain", gradients)["peak"]
            for way in WAYS:
                counted = account(s, tokens, way, gradients)
                real = measured.get((gradients, tokens, way), {}).get("peak GiB")
                memory.append({"gradients": gradients, "tokens": tokens, "way": way, **{k: round(v, 2) for k, v in counted.items()},
                               "recorded peak": real, "counted / recorded": round(counted["peak"] / real, 4) if real else None,
                               "of all": round(counted["peak"] / every, 3)})  # fmt: skip
    for tokens in sizes:
        for way in WAYS:
            done, ms = flops(s, tokens, way), measured.get(("fp32", tokens, way), {}).get("ms")
            rate = {"recorded ms": ms, "TFLOP/s": done["all"] / ms * 1e3 if ms else None}
            work.append({"tokens": tokens, "way": way, **{k: None if v is None else round(v, 2) for k, v in {**done, **rate}.items()}})
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
