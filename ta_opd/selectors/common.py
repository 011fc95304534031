"""What several published rules share: min-max and rank over the valid tokens, finite sampled log-ratios.

Shape suffix: T tokens of the batch.
"""

import numpy as np


def minmax(x_T: np.ndarray, valid_T: np.ndarray) -> np.ndarray:
    """[T] (x - min) / (max - min) over the valid tokens, clipped to [0, 1]; 0 where all are equal."""
    chosen = x_T[valid_T]
    low, high = chosen.min(), chosen.max()
    return np.zeros_like(x_T) if high <= low else np.clip((x_T - low) / (high - low), 0, 1)


def batch_rank(x_T: np.ndarray, valid_T: np.ndarray) -> np.ndarray:
    """[T] rank among the valid tokens scaled to [0, 1], equal values sharing their mean rank; 0 for invalid tokens."""
    chosen = x_T[valid_T]
    ordered = np.sort(chosen)
    mean_rank = (np.searchsorted(ordered, chosen, "left") + np.searchsorted(ordered, chosen, "right") - 1) / 2
    rank_T = np.zeros(x_T.size)
    rank_T[valid_T] = mean_rank / max(chosen.size - 1, 1)
    return rank_T


def sampled_log_ratio(batch) -> np.ndarray:
    """[T] log p_student - log p_teacher of the sampled token, 0 where either is unknown."""
    return np.nan_to_num(batch["sampled_reverse_kl"], nan=0.0, posinf=0.0, neginf=0.0)
