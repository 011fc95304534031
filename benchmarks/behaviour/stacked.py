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
        self._low: dict[str, Tensor] = {}  # bf16 copies of the matrices while sampling: autocast would cast them anew each step

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

    def head(self, run: int) -> Tensor:
        """[V, h] of one run."""
        return self.weights["embed_tokens.weight"][run]

    def heads(self) -> tuple[Tensor, ...]:
        """[V, h] of every run; one backward step for all of them."""
        return self.weights["embed_tokens.weight"].unbind(0)

    def hidden(self, ids_RBS: Tensor) -> Tensor:
        """[R, B, S, h] after the last norm; causal, so that padding on the right changes nothing before it."""
        runs, batch, length = ids_RBS.shape
        positions_NS = torch.arange(length, device=ids_RBS.device).expand(runs * batch, length)
        x, cosines = self._embed(ids_RBS), self._rope(positions_NS)
        for layer in range(self.shape.layers):
            q, k, v = self._qkv(layer, x, cosines)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._after(layer, x, attended)
        return self._norm(x, "norm.weight")

    def logits(self, hidden_RBSh: Tensor) -> Tensor:
        """[R, B, S, V] float32."""
        return self._linear(hidden_RBSh, "embed_tokens.weight").float()

    @torch.no_grad()
    def sample(self, prompts_RBP: Tensor, lengths_RB: Tensor, new_tokens: int, end: int, pad: int, temperature: float, generator) -> Tensor:
        """[R, B, P + new_tokens]: prompts (padded on the right) continued until `end`, `pad` behind it. Temperature 0 is greedy.

        Every response writes at its own position: rows of different prompt lengths share a step.
        """
        runs, batch, width = prompts_RBP.shape
        total, n = width + new_tokens, runs * batch
        tokens_NS = F.pad(prompts_RBP.reshape(n, width), (0, new_tokens), value=pad)
        place_N = lengths_RB.reshape(n).clone()
        tokens_NS[torch.arange(width, device=tokens_NS.device).expand(n, width).ge(place_N[:, None]).nonzero(as_tuple=True)] = pad
        if torch.is_autocast_enabled(self.device.type):
            self._low = {name: w.detach().to(torch.bfloat16) for name, w in self.weights.items() if w.dim() == 3}
        caches = [self._empty_cache(n, total) for _ in range(self.shape.layers)]
        logits = self._prefill(prompts_RBP, caches, place_N)
        done_N, rows = torch.zeros(n, dtype=torch.bool, device=self.device), torch.arange(n, device=self.device)
        slots_S = torch.arange(total, device=self.device)
        for step in range(new_tokens):
            chosen_N = self._choose(logits, temperature, generator)
            chosen_N = torch.where(done_N, pad, chosen_N)
            tokens_NS[rows, place_N] = chosen_N
            done_N = done_N | (chosen_N == end)
            if step == new_tokens - 1 or (step % 8 == 7 and bool(done_N.all())):
                break
            logits = self._decode(chosen_N.view(runs, batch), place_N, caches, slots_S, rows)
            place_N = place_N + 1
        self._low = {}
        return tokens_NS.view(runs, batch, total)

    # ------------------------------------------------------------------ pieces

    def _choose(self, logits_NV: Tensor, temperature: float, generator) -> Tensor:
        if temperature == 0:
            return logits_NV.argmax(-1)
        return torch.multinomial(torch.softmax(logits_NV / temperature, -1), 1, generator=generator)[:, 0]

    def _prefill(self, prompts_RBP: Tensor, caches, place_N: Tensor) -> Tensor:
        """Fills the caches with the prompts; logits [N, V] after each prompt's last token."""
        runs, batch, width = prompts_RBP.shape
        x, cosines = self._embed(prompts_RBP), self._rope(torch.arange(width, device=self.device).expand(runs * batch, width))
        for layer, (keys, values) in enumerate(caches):
            q, k, v = self._qkv(layer, x, cosines)
            keys[:, :, :width], values[:, :, :width] = k, v
            x = self._after(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        last = x.reshape(runs * batch, width, -1)[torch.arange(runs * batch, device=self.device), place_N - 1]
        return self._last_logits(last, runs, batch)

    def _decode(self, chosen_RB: Tensor, place_N: Tensor, caches, slots_S: Tensor, rows: Tensor) -> Tensor:
        runs, batch = chosen_RB.shape
        x, cosines = self._embed(chosen_RB[..., None]), self._rope(place_N[:, None])
        seen = (slots_S[None] <= place_N[:, None])[:, None, None]
        for layer, (keys, values) in enumerate(caches):
            q, k, v = self._qkv(layer, x, cosines)
            keys[rows, :, place_N], values[rows, :, place_N] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
            attended = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen, enable_gqa=True)
            x = self._after(layer, x, attended)
        return self._last_logits(x.reshape(runs * batch, -1), runs, batch)

    def _last_logits(self, last_Nh: Tensor, runs: int, batch: int) -> Tensor:
        normed = self._norm(last_Nh.view(runs, batch, 1, -1), "norm.weight")
        return self.logits(normed).view(runs * batch, -1)

    def _empty_cache(self, n: int, total: int) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if torch.is_autocast_enabled(self.device.type) else torch.float32
        shape = (n, self.shape.kv_heads, total, self.shape.head_dim)
        return torch.zeros(shape, dtype=dtype, device=self.device), torch.zeros(shape, dtype=dtype, device=self.device)

    def _embed(self, ids_RBS: Tensor) -> Tensor:
        table = self.weights["embed_tokens.weight"]
        runs, vocabulary, _ = table.shape
        shifted = ids_RBS + vocabulary * torch.arange(runs, device=ids_RBS.device)[:, None, None]
        return F.embedding(shifted, table.reshape(runs * vocabulary, -1))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """x [R, B, S, in] by the weight [R, out, in]."""
        weight = self._low.get(name, self.weights[name])
        out = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), weight.transpose(1, 2))
        return out.view(*x.shape[:-1], weight.shape[1])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Over the last axis, in float32; the weight [R, width] is spread over what lies between."""
        weight = self.weights[name]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.eps)
        return wide * weight.view(weight.shape[0], *(1,) * (x.dim() - 2), weight.shape[1])

    def _rope(self, positions_NS: Tensor) -> tuple[Tensor, Tensor]:
        half = self.shape.head_dim // 2
        inverse = torch.exp(-math.log(self.shape.theta) * torch.arange(half, device=self.device).float() / half)
        angle = positions_NS[..., None].float() * inverse
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos(), angle.sin()

    def _qkv(self, layer: int, x: Tensor, cosines) -> tuple[Tensor, Tensor, Tensor]:
        """Heads first: [N, heads, S, d]."""
        s, name = self.shape, f"layers.{layer}.self_attn"
        runs, batch, length, _ = x.shape
        normed = self._norm(x, f"layers.{layer}.input_layernorm.weight")

        def heads(which: str, count: int) -> Tensor:
            return self._linear(normed, f"{name}.{which}_proj.weight").view(runs, batch, length, count, s.head_dim)

        q, k = self._norm(heads("q", s.heads), f"{name}.q_norm.weight"), self._norm(heads("k", s.kv_heads), f"{name}.k_norm.weight")
        v = heads("v", s.kv_heads)
        q, k, v = (t.reshape(runs * batch, length, -1, s.head_dim).transpose(1, 2) for t in (q, k, v))
        cos, sin = cosines
        q, k = ((t * cos + _rotated(t) * sin).to(v.dtype) for t in (q, k))
        return q, k, v

    def _after(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        runs, batch, length, _ = x.shape
        flat = attended.transpose(1, 2).reshape(runs, batch, length, -1)
        x = x + self._linear(flat, f"layers.{layer}.self_attn.o_proj.weight")
        normed = self._norm(x, f"layers.{layer}.post_attention_layernorm.weight")
        name = f"layers.{layer}.mlp"
        gated = F.silu(self._linear(normed, f"{name}.gate_proj.weight")) * self._linear(normed, f"{name}.up_proj.weight")
        return x + self._linear(gated, f"{name}.down_proj.weight")


def _rotated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class StackedAdam:
    """Adam with one learning rate a run, and each run's gradient clipped by its own norm."""

    def __init__(self, parameters: list[Tensor], lr_R: Tensor, betas=(0.9, 0.98), eps: float = 1e-8, clip: float = 1.0):
        self.parameters, self.lr, self.betas, self.eps, self.clip = parameters, lr_R, betas, eps, clip
        self.first, self.second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """Applies the gradients and drops them; [R] norms before clipping. A run whose gradient is not finite is left as it is."""
        grads = [p.grad for p in self.parameters]
        norm_R = torch.stack([g.flatten(1).float().pow(2).sum(1) for g in grads]).sum(0).sqrt()
        scale_R = torch.where(norm_R.isfinite(), (self.clip / norm_R.clamp(min=1e-12)).clamp(max=1.0), 0.0)
        self.steps += 1
        one, two = self.betas
        for p, g, m, v in zip(self.parameters, grads, self.first, self.second, strict=True):
            shape = (-1, *(1,) * (p.dim() - 1))
            g = torch.nan_to_num(g, 0.0, 0.0, 0.0) * scale_R.view(shape)
            m.lerp_(g, 1 - one)
            v.mul_(two).addcmul_(g, g, value=1 - two)
            rate = (self.lr * (scale_R > 0)).view(shape) / (1 - one**self.steps)
            p.sub_(rate * m / ((v / (1 - two**self.steps)).sqrt() + self.eps))
            p.grad = None
        return norm_R
