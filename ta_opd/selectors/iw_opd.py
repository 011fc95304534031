"""IW-OPD (arXiv 2606.22600): weights that fall from 1 + gamma to 1 as a response's disagreement is spent.

w_t = 1 + gamma * (1 - sum_{k<t} |A_k| / sum_k |A_k|), A = log p_teacher - log p_student of the sampled token, gamma = 0.5. Sums are over the
valid tokens of one response. At ratio 1 every valid token is kept with its weight; below, the tokens of largest weight are.
"""

import numpy as np

from ta_opd.selectors.common import sampled_log_ratio
from ta_opd.selectors.registry import Batch, Scored, register_selector

GAMMA = 0.5


@register_selector("iw_opd", paper="IW-OPD, arXiv 2606.22600")
def iw_opd(batch: Batch) -> Scored:
    """More weight early in a response, measured in disagreement spent."""
    gap_T = np.abs(sampled_log_ratio(batch)).astype(np.float64) * batch.valid
    before_T = np.cumsum(gap_T) - gap_T
    ends_N = np.cumsum(batch.response_lengths)
    running = np.concatenate([[0.0], np.cumsum(gap_T)])
    starts_N = ends_N - batch.response_lengths
    total_N = running[ends_N] - running[starts_N]
    spent_T = (before_T - running[starts_N][batch.sample]) / np.maximum(total_N, 1e-12)[batch.sample]
    weight_T = 1 + GAMMA * (1 - np.clip(spent_T, 0, 1))
    return Scored(weight_T, weights=weight_T)
