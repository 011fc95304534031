"""Base advantages from task rewards, for the sampled reverse-KL loss. Pure distillation has no reward: all zeros.

grpo: reward minus the mean of its group, divided by the group's standard deviation, the same at every token
(DeepSeekMath, arXiv 2402.03300, section 4.1). reinforce_plus_plus: the reward at the last token, discounted backwards
(REINFORCE++, arXiv 2501.03262); normalised over the batch by `normalize_advantages`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ta_opd.errors import ConfigError, DataError

ESTIMATORS = ("grpo", "reinforce_plus_plus")
_EPS = 1e-6


def group_normalized(rewards: Sequence[float], groups: Sequence[int]) -> np.ndarray:
    """(reward - mean of its group) / (sample standard deviation + 1e-6), float64 [N]; groups of one give 0."""
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if rewards.shape != groups.shape:
        raise DataError(f"advantages: expected one group a reward, got {groups.shape} for {rewards.shape}")
    out = np.zeros_like(rewards)
    for group in np.unique(groups):
        own = groups == group
        if own.sum() > 1:
            out[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std(ddof=1) + _EPS)
    return out


def token_advantages(
    estimator: str, rewards: Sequence[float], lengths: Sequence[int], *, gamma: float = 1.0
) -> list[np.ndarray]:
    """Base advantage of every response token: float32 [L] a sample.

    rewards: one number a sample; for grpo already group-normalised. Raises ConfigError for an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"--advantage-estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    discount = 1.0 if estimator == "grpo" else gamma
    return [
        (reward * discount ** np.arange(length - 1, -1, -1)).astype(np.float32)
        for reward, length in zip(rewards, lengths, strict=True)
    ]


def whiten(advantages: list[np.ndarray], masks: list[np.ndarray], moments: tuple[float, float, float]) -> list[np.ndarray]:
    """Advantages minus the batch mean over the batch standard deviation, zero where the mask is 0.

    moments: (count, sum, sum of squares) over the valid tokens of all ranks, from `masked_moments` summed.
    """
    count, total, squares = moments
    mean = total / max(count, 1.0)
    std = max(squares / max(count, 1.0) - mean * mean, 0.0) ** 0.5
    return [((a - mean) / (std + _EPS) * (m > 0)).astype(np.float32) for a, m in zip(advantages, masks, strict=True)]


def masked_moments(advantages: list[np.ndarray], masks: list[np.ndarray]) -> tuple[float, float, float]:
    values = np.concatenate([np.zeros(0), *(a[m > 0] for a, m in zip(advantages, masks, strict=True))]).astype(np.float64)
    return float(values.size), float(values.sum()), float((values**2).sum())
