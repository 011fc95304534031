"""Sample: one response of one prompt, from sampling to training. Field names are slime's.

Per-token fields are arrays over the response, length `response_length`, from the moment a reply is parsed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from ta_opd.topk import TopK


@dataclass
class Sample:
    """One sampled response.

    tokens: prompt ids followed by response ids. loss_mask: 1 where a response position is a valid target (never
    overwritten by selection). opd_weights: how much direct supervision a position gets (0 = not selected), float32.
    student_topk, teacher_topk: the K most likely tokens of each model at every response position.
    teacher_at_student_ids: teacher log-probs at the student's top-K ids, float32 [L, K], NaN where unknown.
    token_metrics: columns of ta_opd.metrics, from scoring to selection.
    weight_versions: [version, number of tokens] of the weights that the response was sampled with, in its order.
    """

    class Status(StrEnum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    prompt: str | list[dict[str, str]] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    rollout_log_probs: np.ndarray | None = None
    teacher_log_probs: np.ndarray | None = None
    student_topk: TopK | None = None
    teacher_topk: TopK | None = None
    teacher_at_student_ids: np.ndarray | None = None
    opd_weights: np.ndarray | None = None
    token_metrics: dict[str, np.ndarray] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    weight_versions: list[list] = field(default_factory=list)
    rollout_id: int | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def response_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def truncated(self) -> bool:
        return self.status is Sample.Status.TRUNCATED

    def valid_mask(self) -> np.ndarray:
        """bool [L]: positions that are valid targets; every position where no mask was given."""
        if self.loss_mask is None:
            return np.ones(self.response_length, dtype=bool)
        return np.asarray(self.loss_mask, dtype=bool)
