"""Base advantages from a task reward, to which `sampled_reverse_kl` adds its signal. NumPy, no torch.

In pure distillation the reward is 0 and so is every advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ta_opd.errors import ConfigError, DataError

ADVANTAGE_ESTIMATORS = ("grpo", "reinforce_plus_plus")


def group_normalized(rewards_N, groups_N, *, scale_by_std: bool = True) -> np.ndarray:
    """GRPO: reward less the mean of its group (samples of one prompt), over the group's standard deviation + 1e-6. f32 [N].

    The deviation is the sample one (n - 1); a group of one sample, or of equal rewards, gets 0.
    """
    rewards_N, groups_N = np.asarray(rewards_N, np.float64), np.asarray(groups_N)
    if rewards_N.shape != groups_N.shape:
        raise DataError(f"expected one group for each of {rewards_N.shape} rewards, got {groups_N.shape}")
    _, index_N, counts_G = np.unique(groups_N, return_inverse=True, return_counts=True)
    mean_G = np.bincount(index_N, rewards_N) / counts_G
    centred_N = rewards_N - mean_G[index_N]
    if scale_by_std:
        deviation_G = np.sqrt(np.bincount(index_N, centred_N**2) / np.maximum(counts_G - 1, 1))
        centred_N = centred_N / (deviation_G[index_N] + 1e-6)
    return centred_N.astype(np.float32)


def token_advantages(estimator: str, rewards_N, loss_masks: Sequence[np.ndarray], *, gamma: float = 1.0) -> list[np.ndarray]:
    """Advantage of every response position, one f32 array [L] a sample; 0 at masked positions.

    grpo: the (group-normalised) reward at every position. reinforce_plus_plus: the reward comes at the last valid position and
    is discounted by gamma for each position before it. Raises ConfigError on another name, DataError on counts that differ.
    """
    if estimator not in ADVANTAGE_ESTIMATORS:
        raise ConfigError(f"expected --advantage-estimator to be one of {ADVANTAGE_ESTIMATORS}, got {estimator!r}")
    if len(rewards_N) != len(loss_masks):
        raise DataError(f"expected one reward a sample, got {len(rewards_N)} rewards for {len(loss_masks)} samples")
    out = []
    for reward, mask in zip(rewards_N, loss_masks, strict=True):
        valid_L = np.asarray(mask) > 0
        advantage_L = np.full(valid_L.shape, float(reward))
        if estimator == "reinforce_plus_plus" and valid_L.any():
            last = int(np.flatnonzero(valid_L)[-1])
            advantage_L *= float(gamma) ** np.abs(last - np.arange(len(valid_L)))
        out.append(np.where(valid_L, advantage_L, 0.0).astype(np.float32))
    return out


def whitened(advantages: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages less their mean over valid positions, over their standard deviation (+ 1e-8). Give it the whole batch."""
    masks = [np.asarray(mask) > 0 for mask in loss_masks]
    values = np.concatenate([a[m] for a, m in zip(advantages, masks, strict=True)]) if advantages else np.zeros(0)
    if not len(values):
        return [np.zeros_like(a) for a in advantages]
    mean, scale = values.mean(dtype=np.float64), values.std(dtype=np.float64) + 1e-8
    return [np.where(m, (a - mean) / scale, 0.0).astype(np.float32) for a, m in zip(advantages, masks, strict=True)]
