"""The sizes of the behaviour run: models, corpus, and how much each run of distillation samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.reasoning.corpus import VOCABULARY, Level


@dataclass(frozen=True)
class Width:
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + VOCABULARY * self.hidden


@dataclass(frozen=True)
class Pretrain:
    """Cross-entropy on worked solutions, AdamW, warm-up and cosine. stop_at: share of validation problems solved at which training ends."""

    width: Width
    steps: int
    batch: int
    lr: float
    seed: int
    problems: int
    stop_at: float | None = None
    check_every: int = 20
    warmup: int = 40


@dataclass(frozen=True)
class Size:
    """rollouts x prompts responses of at most `response` tokens in every run; `group` runs share the device."""

    teacher: Pretrain
    student: Pretrain
    level: Level
    rollouts: int
    prompts: int
    response: int
    group: int
    heldout: int
    validation: int
    contexts: int
    rates: tuple[float, float]
    budgets: tuple[float, ...] = (0.05, 0.10, 0.30)
    seeds: tuple[int, ...] = (1, 2, 3)
    losses: tuple[str, ...] = ("sampled_reverse_kl", "topk_reverse_kl")
    selectors: tuple[str, ...] = field(default=())  # empty: all of the registry
    k: int = 16


SIZES = {
    "gpu": Size(
        teacher=Pretrain(Width(1024, 2816, 10, 16, 8, 64), steps=1200, batch=256, lr=6e-4, seed=3, problems=200_000),
        student=Pretrain(Width(512, 1536, 8, 8, 4, 64), steps=1500, batch=256, lr=1e-3, seed=7, problems=100_000, stop_at=0.4),
        level=Level(), rollouts=40, prompts=32, response=56, group=56, heldout=256, validation=128, contexts=160, rates=(1e-4, 4e-4),
    ),
    "mid": Size(
        teacher=Pretrain(Width(128, 384, 3, 4, 2, 32), steps=1200, batch=64, lr=4e-3, seed=3, problems=40_000),
        student=Pretrain(Width(96, 256, 2, 4, 2, 24), steps=400, batch=64, lr=4e-3, seed=7, problems=10_000, stop_at=0.25),
        level=Level(largest=40, operand=9, steps=(2, 2), names=16), rollouts=300, prompts=24, response=28, group=20, heldout=300, validation=120,
        contexts=60, rates=(2e-4, 5e-4), budgets=(0.10,), seeds=(1, 2, 3, 4, 5), losses=("topk_reverse_kl",),
        selectors=("random", "entropy", "divergence", "compatibility", "dlearn_high", "ca_softor", "ta_opd_ier_or", "tip", "prefix"),
    ),
    "tiny": Size(
        teacher=Pretrain(Width(48, 96, 2, 2, 1, 24), steps=10, batch=16, lr=4e-3, seed=3, problems=200),
        student=Pretrain(Width(32, 64, 2, 2, 1, 16), steps=5, batch=16, lr=4e-3, seed=7, problems=200),
        level=Level(largest=40, operand=9, steps=(2, 2), names=16), rollouts=2, prompts=6, response=16, group=10, heldout=10, validation=6,
        contexts=4, rates=(1e-3, 4e-3), budgets=(0.3,), seeds=(1, 2), selectors=("dlearn_high",),
    ),
}  # fmt: skip
