"""What one step has to do: prompts, lengths, K and budget, and the token counts that follow."""

from __future__ import annotations

from dataclasses import dataclass

from ta_opd.errors import ConfigError

CUTS = ("even", "prefix")


@dataclass(frozen=True)
class Workload:
    """One rollout and its optimizer steps; counts of tokens are of the whole batch.

    response_mean: tokens of a response on average, response_len at most (all of them where not given). Lengths are taken as
    spread evenly around the mean. cut: where kept tokens lie, `even` all over the response or `prefix` at its begin; the
    trainer cuts a response after its last kept token. all_rows: every row meets the vocabulary matrix (`--opd-loss-rows all`).
    """

    prompts: int = 64
    samples: int = 4
    prompt_len: int = 256
    response_len: int = 1024
    response_mean: float | None = None
    k: int = 16
    budget: float = 0.10
    cut: str = "even"
    all_rows: bool = False
    recompute: bool = True
    optimizer_steps: int = 1
    bank: bool = True
    overlap: bool = True  # score each response as it ends
    optimizer_cpu_offload: bool = False  # the optimizer's state in host memory
    asynchronous: bool = False  # train_async.py: the next rollout is made while this one trains
    max_tokens: int | None = None  # of one micro-batch and context-parallel rank; None: what fits
    student_concurrency: int = 256
    graph_batch: int = 256  # largest batch with a CUDA graph

    def __post_init__(self):
        for name in ("prompts", "samples", "prompt_len", "response_len", "optimizer_steps", "student_concurrency", "graph_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.k < 0:
            raise ConfigError(f"k: expected 0 or more, got {self.k}")
        if not 0 < self.budget <= 1:
            raise ConfigError(f"budget: expected a share in (0, 1], got {self.budget} (0.10 keeps 10 %)")
        if self.cut not in CUTS:
            raise ConfigError(f"cut: expected one of {', '.join(CUTS)}, got {self.cut!r}")
        if self.response_mean is not None and not 1 <= self.response_mean <= self.response_len:
            raise ConfigError(f"response_mean: expected 1 to response_len {self.response_len}, got {self.response_mean}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if self.responses % self.optimizer_steps:
            raise ConfigError(f"optimizer_steps: expected a divisor of the {self.responses} responses, got {self.optimizer_steps}")

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def mean(self) -> float:
        return float(self.response_mean or self.response_len)

    @property
    def response_tokens(self) -> float:
        return self.responses * self.mean

    @property
    def sequence_tokens(self) -> float:
        return self.responses * (self.prompt_len + self.mean)

    @property
    def longest(self) -> int:
        return self.prompt_len + self.response_len

    @property
    def first_end(self) -> float:
        """Length of the shortest response over that of the longest."""
        return max(0.0, 2 * self.mean / self.response_len - 1)

    @property
    def kept_rows(self) -> float:
        return self.response_tokens if self.all_rows else self.response_tokens * self.budget

    @property
    def trained_response(self) -> float:
        """Response positions that the trainer computes, a response."""
        if self.all_rows or self.budget >= 1:
            return self.mean
        if self.cut == "prefix":
            return self.mean * self.budget
        return max(self.mean - (1 - self.budget) / self.budget, self.mean * self.budget, 1.0)

    @property
    def trained_tokens(self) -> float:
        return self.responses * (self.prompt_len + self.trained_response)
