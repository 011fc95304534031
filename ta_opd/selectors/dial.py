"""DIAL-OPD (arXiv 2610.11659): the sampled token's probability gap, s = |log q/p|^(1-beta) * |q - p|^beta.

p, q: student's and teacher's probability of the sampled token; top ratio of every response. beta is near 1 in the paper; `dial` is beta = 1.
"""

import numpy as np

from ta_opd.selectors.registry import Batch, register_selector


def dial_score(batch: Batch, beta: float) -> np.ndarray:
    """[T] DIAL score; 0 where a log-prob is unknown."""
    student_T, teacher_T = batch["student_logp_sampled"], batch["teacher_logp_sampled"]
    with np.errstate(over="ignore", invalid="ignore"):
        gap_T = np.abs(np.exp(np.minimum(teacher_T, 0)) - np.exp(np.minimum(student_T, 0)))
        score_T = gap_T**beta * np.abs(batch["sampled_reverse_kl"]) ** (1 - beta)
    return np.nan_to_num(score_T, nan=0.0, posinf=0.0)


@register_selector("dial", paper="DIAL-OPD, arXiv 2610.11659", defaults={"scope": "response"})
def dial(batch: Batch) -> np.ndarray:
    """Largest |q - p| of the sampled token, per response (DIAL with beta = 1)."""
    return dial_score(batch, beta=1.0)
