"""SuRe (arXiv 2608.25643): weights, not a mask. w = 1 + alpha * (1 - p_student(y)), alpha = 1, for the squared log-ratio loss.

At ratio 1 every valid token is kept with its weight; below, the tokens of largest weight are.
"""

import numpy as np

from ta_opd.selectors.registry import Batch, Scored, register_selector

ALPHA = 1.0


@register_selector("sure", paper="SuRe, arXiv 2608.25643")
def sure(batch: Batch) -> Scored:
    """More weight where the student was less sure of the token it sampled: 1 + (1 - p)."""
    p_T = np.exp(np.minimum(np.nan_to_num(batch["student_logp_sampled"], nan=0.0), 0))
    weight_T = 1 + ALPHA * (1 - p_T)
    return Scored(weight_T, weights=weight_T)
