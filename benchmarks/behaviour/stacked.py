"""Many small Qwen3 models of one shape at once: every weight has a leading run axis, every product is a batched one.

Hundreds of short runs differ in what they are taught, not in their shape. Stacked, they share every kernel launch. Shapes: R runs,
B responses of a run, S positions, h hidden, V vocabulary; N = R x B. Weights are float32; on a GPU products run in bf16 under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_QKV = tuple(f"self_attn.{which}_proj.weight" for which in "qkv")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_JOINED = (*_QKV, *_GATE_UP)


@dataclass(frozen=True)
class StackShape:
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float = 1e4
    eps: float = 1e-6

    @classmethod
    def of(cls, config) -> StackShape:
        """From a transformers Qwen3Config."""
        return cls(config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                   config.head_dim, config.rope_parameters["rope_theta"], config.rms_norm_eps)  # fmt: skip


class Stack:
    """R copies of a model with tied embeddings. weights: HF names without `model.`, each [R, ...]."""

    def __init__(self, shape: StackShape, weights: Mapping[str, Tensor]):
        self.shape, self.weights = shape, dict(weights)
        self.device = next(iter(self.weights.values())).device
        self._held: dict = {}  # while sampling: matrices as products want them

    @classmethod
    def copies(cls, model, count: int, device) -> Stack:
        """`count` copies of a transformers Qwen3ForCausalLM."""
        state = {n.removeprefix("model."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        weights = {n: t.detach().to(device, torch.float32).expand(count, *t.shape).clone() for n, t in state.items()}
        return cls(StackShape.of(model.config), weights)

    def state_of(self, run: int) -> dict[str, Tensor]:
        """The weights of one run by their HF names."""
        out = {f"model.{n}": t[run].detach().cpu() for n, t in self.weights.items()}
        return out | {"lm_head.weight": out["model.embed_tokens.weight"]}

    def require_grad(self) -> list[Tensor]:
        for tensor in self.weights.values():
            tensor.requires_grad_(True)
        return list(self.weights.values())

    def heads(self) -> Tensor:
        """[R, V, h]"""
        return self.weights["embed_tokens.weight"]

    def hidden(self, ids_RBS: Tensor, ends_RB: Tensor | None = None) -> Tensor:
        """[R, B, S, h] after the last norm; causal, so that padding on the right changes nothing before it.

        ends_RB: only positions before these are wanted; the products then run over those of each run, packed (`pack`), and what stands
        behind them in the result means nothing.
        """
        runs, batch, length = ids_RBS.shape
        index_RL = None if ends_RB is None else pack(torch.arange(length, device=ids_RBS.device) < ends_RB[..., None])
        flat_RT = ids_RBS.reshape(runs, batch * length)
        place_RT = torch.arange(length, device=ids_RBS.device).expand(runs, batch, length).reshape(runs, batch * length)
        flat = None
        if index_RL is not None:
            flat_RT, place_RT, flat = flat_RT.gather(1, index_RL), place_RT.gather(1, index_RL), flattened(index_RL, batch * length)
        x, rope = self._embed(flat_RT), self._rope(place_RT)
        for layer in range(self.shape.layers):
            heads = [_spread(t, flat, runs * batch, length).transpose(1, 2) for t in self._qkv(layer, x, rope)]
            attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
            x = self._after(layer, x, _gathered(attended.reshape(runs * batch * length, -1), flat).view(*x.shape[:2], -1))
        out = self._norm(x, "norm.weight")
        return _spread(out, flat, runs * batch, length).view(runs, batch, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, ..., V] float32 of hidden states [R, ..., h]."""
        return self._linear(hidden, self._weight("embed_tokens.weight")).float()

    @torch.no_grad()
    def sample(self, prompts_RBP: Tensor, lengths_RB: Tensor, new_tokens: int, end: int, pad: int, temperature: float, generator) -> Tensor:
        """[R, B, P + new_tokens]: prompts (padded on the right) continued until `end`, `pad` behind it. Temperature 0 is greedy.

        Every response writes at its own position: rows of different prompt lengths share a step.
        """
        runs, batch, width = prompts_RBP.shape
        total, n = width + new_tokens, runs * batch
        tokens_NS = F.pad(prompts_RBP.reshape(n, width), (0, new_tokens), value=pad)
        place_N = lengths_RB.reshape(n).clone()
        slots_S = torch.arange(-(-total // 8) * 8, device=self.device)  # caches in whole eights, as attention kernels want their masks
        tokens_NS = torch.where(slots_S[:total] < place_N[:, None], tokens_NS, pad)
        self._hold()
        dtype = self._dtype()
        caches = [torch.zeros(2, n, len(slots_S), self.shape.kv_heads, self.shape.head_dim, dtype=dtype, device=self.device) for _ in range(self.shape.layers)]
        logits = self._prefill(prompts_RBP, caches, place_N)
        done_N, rows_N = torch.zeros(n, dtype=torch.bool, device=self.device), torch.arange(n, device=self.device)
        for step in range(new_tokens):
            chosen_N = self._choose(logits, temperature, generator)
            chosen_N = torch.where(done_N, pad, chosen_N)
            tokens_NS.scatter_(1, place_N[:, None], chosen_N[:, None])
            done_N = done_N | (chosen_N == end)
            if step == new_tokens - 1 or (step % 8 == 7 and bool(done_N.all())):
                break
            logits = self._decode(chosen_N.view(runs, batch), place_N, caches, slots_S, rows_N)
            place_N = place_N + 1
        self._held = {}
        return tokens_NS.view(runs, batch, total)

    # ------------------------------------------------------------------ pieces: x is [R, L, h], L positions of each run in any layout

    def _choose(self, logits_NV: Tensor, temperature: float, generator) -> Tensor:
        if temperature == 0:
            return logits_NV.argmax(-1)
        return torch.multinomial(torch.softmax(logits_NV / temperature, -1), 1, generator=generator)[:, 0]

    def _prefill(self, prompts_RBP: Tensor, caches, place_N: Tensor) -> Tensor:
        """Fills the caches with the prompts; logits [N, V] after each prompt's last token."""
        runs, batch, width = prompts_RBP.shape
        n = runs * batch
        x = self._embed(prompts_RBP.reshape(runs, batch * width))
        rope = self._rope(torch.arange(width, device=self.device).repeat(batch).expand(runs, batch * width))
        for layer, cache in enumerate(caches):
            q, k, v = (_spread(t, None, n, width) for t in self._qkv(layer, x, rope))
            cache[0, :, :width], cache[1, :, :width] = k, v
            attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
            x = self._after(layer, x, attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        last = x.reshape(n, width, -1)[torch.arange(n, device=self.device), place_N - 1]
        return self._last_logits(last.view(runs, batch, -1))

    def _decode(self, chosen_RB: Tensor, place_N: Tensor, caches, slots_S: Tensor, rows_N: Tensor) -> Tensor:
        """The caches get the chosen tokens at their places; logits [N, V] of the next."""
        runs, batch = chosen_RB.shape
        n, total, s = runs * batch, len(slots_S), self.shape
        x, rope = self._embed(chosen_RB), self._rope(place_N.view(runs, batch))
        unseen = torch.zeros(n, total, dtype=self._dtype(), device=self.device).masked_fill_(slots_S > place_N[:, None], -torch.inf)[:, None, None]
        slot_N = rows_N * total + place_N
        for layer, cache in enumerate(caches):
            q, k, v = self._qkv(layer, x, rope)
            for own, new in zip(cache, (k, v), strict=True):
                own.view(n * total, -1).index_copy_(0, slot_N, new.reshape(n, -1))
            # The query heads that share a key are rows of one small product: no key is repeated.
            grouped = q.reshape(n, s.kv_heads, s.heads // s.kv_heads, s.head_dim)
            attended = F.scaled_dot_product_attention(grouped, *cache.transpose(2, 3), attn_mask=unseen)
            x = self._after(layer, x, attended.reshape(runs, batch, -1))
        return self._last_logits(x)

    def _last_logits(self, last_RBh: Tensor) -> Tensor:
        return self.logits(self._norm(last_RBh, "norm.weight")).flatten(0, 1)

    def _dtype(self) -> torch.dtype:
        """Of products and caches: bf16 under autocast."""
        return torch.bfloat16 if torch.is_autocast_enabled(self.device.type) else torch.float32

    def _hold(self) -> None:
        """Keeps the matrices as products want them for the whole of a call: else they would be cast and joined anew each step."""
        self._held = {}
        names = ["embed_tokens.weight", *(n for n in self.weights if n.endswith("_proj.weight") and not any(p in n for p in _JOINED))]
        found = {name: self._weight(name).detach() for name in names}
        for layer in range(self.shape.layers):
            for group in (_QKV, _GATE_UP):
                joined = tuple(f"layers.{layer}.{part}" for part in group)
                found[joined] = self._weight(*joined).detach()
            found[layer] = self._head_norm(layer).detach()
        self._held = found

    def _weight(self, *names: str) -> Tensor:
        """[R, out, in] in the type of products; several matrices of one input are one."""
        key = names if len(names) > 1 else names[0]
        if key in self._held:
            return self._held[key]
        parts = [self.weights[name].to(self._dtype()) for name in names]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _embed(self, ids_RL: Tensor) -> Tensor:
        table = self.weights["embed_tokens.weight"]
        runs, vocabulary, _ = table.shape
        shifted = ids_RL + vocabulary * torch.arange(runs, device=ids_RL.device)[:, None]
        return F.embedding(shifted, table.reshape(runs * vocabulary, -1))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [R, ..., in] by the weight [R, out, in]."""
        out = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]).to(weight.dtype), weight.transpose(1, 2))
        return out.view(*x.shape[:-1], weight.shape[1])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Over the last axis, in float32; the weight [R, width] is spread over what lies between."""
        return self._scaled(x, self.weights[name].view(x.shape[0], *(1,) * (x.dim() - 2), -1))

    def _scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.shape.eps) * weight

    def _rope(self, positions_RL: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, sines signed for `_rotated`), [R, L, 1, d]."""
        half = self.shape.head_dim // 2
        inverse = torch.exp(-math.log(self.shape.theta) * torch.arange(half, device=self.device).float() / half)
        angle = positions_RL[..., None, None].float() * inverse
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _head_norm(self, layer: int) -> Tensor:
        """[R, 1, heads + kv_heads, d]: the norm's weight of every query and key head."""
        s, name = self.shape, f"layers.{layer}.self_attn"
        q, k = (self.weights[f"{name}.{which}_norm.weight"][:, None, None] for which in "qk")
        return torch.cat([q.expand(-1, -1, s.heads, -1), k.expand(-1, -1, s.kv_heads, -1)], 2)

    def _qkv(self, layer: int, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """[R, L, heads, d] each, in the type of products. Queries and keys are normed and turned together."""
        s, (cos, sin) = self.shape, rope
        normed = self._norm(x, f"layers.{layer}.input_layernorm.weight")
        joined = self._linear(normed, self._weight(*(f"layers.{layer}.{part}" for part in _QKV))).view(*x.shape[:2], -1, s.head_dim)
        both, v = joined.split((s.heads + s.kv_heads, s.kv_heads), 2)
        both = self._scaled(both, self._held[layer] if layer in self._held else self._head_norm(layer))
        turned = torch.addcmul(both * cos, both.roll(s.head_dim // 2, -1), sin).to(v.dtype)
        q, k = turned.split((s.heads, s.kv_heads), 2)
        return q, k, v

    def _after(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention [R, L, heads x d] in a layer."""
        x = x + self._linear(attended, self._weight(f"layers.{layer}.self_attn.o_proj.weight"))
        normed = self._norm(x, f"layers.{layer}.post_attention_layernorm.weight")
        gate, up = self._linear(normed, self._weight(*(f"layers.{layer}.{part}" for part in _GATE_UP))).chunk(2, -1)
        return x + self._linear(F.silu(gate) * up, self._weight(f"layers.{layer}.mlp.down_proj.weight"))


def pack(wanted_RBS: Tensor) -> Tensor:
    """[R, L] places in [B x S]: first the wanted ones of each run in their order, then others; L is the most that a run wants."""
    wanted_RT = wanted_RBS.flatten(1)
    longest = int(wanted_RT.sum(1).max())
    return (~wanted_RT).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]


def flattened(index_RL: Tensor, width: int) -> Tensor:
    """[R x L]: places in [R x width] of places [R, L] in each run's [width]."""
    return (index_RL + width * torch.arange(len(index_RL), device=index_RL.device)[:, None]).flatten()


def _spread(packed_RL: Tensor, flat: Tensor | None, count: int, length: int) -> Tensor:
    """[count, length, ...] of packed positions [R, L, ...], zeros where there is none; flat None: all are there, in order."""
    rows = packed_RL.reshape(-1, *packed_RL.shape[2:])
    if flat is not None:
        rows = rows.new_zeros(count * length, *rows.shape[1:]).index_copy(0, flat, rows)
    return rows.view(count, length, *rows.shape[1:])


def _gathered(rows: Tensor, flat: Tensor | None) -> Tensor:
    return rows if flat is None else rows.index_select(0, flat)


class StackedAdam:
    """Adam with one learning rate a run, and each run's gradient clipped by its own norm."""

    def __init__(self, parameters: list[Tensor], lr_R: Tensor, betas=(0.9, 0.98), eps: float = 1e-8, clip: float = 1.0):
        self.parameters, self.lr, self.betas, self.eps, self.clip = parameters, lr_R, betas, eps, clip
        self.first, self.second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> list[float]:
        """Applies the gradients and drops them; [R] norms before clipping. A run whose gradient is not finite is left as it is."""
        grads = [p.grad for p in self.parameters]
        norm_R = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float32) for g in grads]).norm(dim=0)
        norms = norm_R.tolist()
        scale_R = torch.where(norm_R.isfinite(), (self.clip / norm_R.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        self.steps += 1
        one, two = self.betas
        correction = math.sqrt(1 - two**self.steps)
        # p -= lr m / (1 - one^t) / (sqrt(v / (1 - two^t)) + eps), with as few passes over the weights as single kernels allow
        divisor_R = -(1 - one**self.steps) / (correction * self.lr * (scale_R > 0))
        for p, g, m, v in zip(self.parameters, grads, self.first, self.second, strict=True):
            shape = (-1, *(1,) * (p.dim() - 1))
            if not all(map(math.isfinite, norms)):
                g.nan_to_num_(0.0, 0.0, 0.0)
            g.mul_(scale_R.view(shape))
            m.lerp_(g, 1 - one)
            v.mul_(two).addcmul_(g, g, value=1 - two)
            p.addcdiv_(m, v.sqrt().add_(self.eps * correction).mul_(divisor_R.view(shape)))
            p.grad = None
        return norms
