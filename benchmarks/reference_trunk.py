"""A plain PyTorch Qwen3 trunk over packed sequences, with recompute, to time the LM head and loss inside a whole model step.

Simplified on purpose: one device, no dropout, random weights, sequences of one length. Shapes: T packed tokens, R rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from slime.backends.megatron_utils.attention import segment_attention


@dataclass(frozen=True)
class Shape:
    layers: int = 28
    hidden: int = 2048
    ffn: int = 6144
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936


QWEN3_1_7B = Shape()
TINY = Shape(layers=2, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=8, vocab=500)


class Layer(nn.Module):
    """One decoder layer; with `rows_R` only those rows go on after attention, output [R, H]."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.norm_in, self.norm_mlp = nn.RMSNorm(s.hidden, eps=1e-6), nn.RMSNorm(s.hidden, eps=1e-6)
        self.norm_q, self.norm_k = nn.RMSNorm(s.head_dim, eps=1e-6), nn.RMSNorm(s.head_dim, eps=1e-6)
        self.q = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.kv = nn.Linear(s.hidden, 2 * s.kv_heads * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.up = nn.Linear(s.hidden, 2 * s.ffn, bias=False)
        self.down = nn.Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x_TH, cos_Td, sin_Td, cu_N, longest: int, rows_R=None):
        s, y_TH = self.s, self.norm_in(x_TH)
        q = self.norm_q(self.q(y_TH).unflatten(1, (s.heads, s.head_dim)))
        k, v = self.kv(y_TH).unflatten(1, (2, s.kv_heads, s.head_dim)).unbind(1)
        q, k = rotate(q, cos_Td, sin_Td), rotate(self.norm_k(k), cos_Td, sin_Td)
        y = segment_attention(q, k, v, cu_N, cu_N, longest, longest, s.head_dim**-0.5).flatten(1)
        if rows_R is not None:
            x_TH, y = x_TH[rows_R], y[rows_R]
        x_TH = x_TH + self.out(y)
        gate, up = self.up(self.norm_mlp(x_TH)).chunk(2, dim=1)
        return x_TH + self.down(F.silu(gate) * up)


def rotate(x_Thd, cos_Td, sin_Td):
    a, b = x_Thd.chunk(2, dim=-1)
    return x_Thd * cos_Td[:, None] + torch.cat([-b, a], -1) * sin_Td[:, None]


class Trunk(nn.Module):
    """Embedding (tied to the LM head), layers, last norm. `forward` gives hidden states [T, H], or those of `rows_R`, [R, H]."""

    def __init__(self, s: Shape, device, dtype):
        super().__init__()
        self.s = s
        with torch.device(device):
            self.embedding = nn.Parameter(torch.empty(s.vocab, s.hidden, dtype=dtype).normal_(0, 0.02))
            self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers)).to(dtype)
            self.norm = nn.RMSNorm(s.hidden, eps=1e-6, dtype=dtype)
        for name, p in self.layers.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / (2 * s.layers) ** 0.5 if ("out" in name or "down" in name) else 0.02)

    def forward(self, tokens_T, lengths: int, rows_R=None, select_in_last_layer: bool = True):
        half = torch.arange(0, self.s.head_dim, 2, device=tokens_T.device) / self.s.head_dim
        position_T = torch.arange(tokens_T.numel(), device=tokens_T.device) % lengths
        angle = torch.outer(position_T.float(), 1e6**-half).repeat(1, 2)
        cos, sin = angle.cos().to(self.embedding.dtype), angle.sin().to(self.embedding.dtype)
        cu_N = torch.arange(0, tokens_T.numel() + 1, lengths, dtype=torch.int32, device=tokens_T.device)
        x = self.embedding[tokens_T]
        for i, layer in enumerate(self.layers):
            rows = rows_R if select_in_last_layer and i == len(self.layers) - 1 else None
            x = checkpoint(layer, x, cos, sin, cu_N, lengths, rows, use_reentrant=False)
        if rows_R is not None and not select_in_last_layer:
            x = x[rows_R]
        return self.norm(x)
