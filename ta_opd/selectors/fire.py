"""FiRe-OPD (arXiv 2606.02684): drop the responses the teacher finds least likely, weight the rest by both entropies.

The 20 % of responses with the lowest mean teacher log-prob get nothing. In the others
w = (1 + a * (1 - H_teacher / max H_teacher)) * (1 + b * H_student / max H_student), a = b = 1, divided by its mean over their valid tokens
(maxima over the valid tokens of the batch).
"""

import numpy as np

from ta_opd.selectors.registry import Batch, Scored, register_selector

DROPPED = 0.2
A = B = 1.0


@register_selector("fire", paper="FiRe-OPD, arXiv 2606.02684")
def fire(batch: Batch) -> Scored:
    """Drop the fifth of responses least likely under the teacher; more weight where the teacher is sure and the student is not."""
    valid_T, sample_T = batch.valid, batch.sample
    num = batch.response_lengths.size
    logprob_T = np.nan_to_num(batch["teacher_logp_sampled"], nan=0.0, posinf=0.0, neginf=np.finfo(np.float32).min)
    count_N = np.bincount(sample_T[valid_T], minlength=num)
    mean_N = np.bincount(sample_T[valid_T], weights=logprob_T[valid_T], minlength=num) / np.maximum(count_N, 1)
    heard_N = np.flatnonzero(count_N)
    dropped_N = heard_N[np.argsort(mean_N[heard_N], kind="stable")[: int(DROPPED * heard_N.size)]]
    candidates_T = valid_T & ~np.isin(sample_T, dropped_N)
    student_T, teacher_T = (_of_largest(batch[name], valid_T) for name in ("Hs_topk", "Ht_topk"))
    weight_T = (1 + A * (1 - teacher_T)) * (1 + B * student_T)
    weight_T = weight_T / weight_T[candidates_T].mean()
    return Scored(weight_T, weights=weight_T, candidates=candidates_T)


def _of_largest(values_T: np.ndarray, valid_T: np.ndarray) -> np.ndarray:
    """Share of the largest at a valid position; one that is not valid may have more, and counts as 1 (its weight is not used)."""
    return np.minimum(values_T / max(values_T[valid_T].max(), 1e-12), 1.0)
