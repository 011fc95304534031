"""The sampled reverse KL, log p_student - log p_teacher of the sampled token, as in the comparisons of IER-OPD (arXiv 2609.24432)."""

import numpy as np

from ta_opd.selectors.registry import Batch, Scored, register_selector

PAPER = "baseline of IER-OPD, arXiv 2609.24432"


def _known(batch: Batch) -> Scored:
    ratio_T = batch["sampled_reverse_kl"]
    return Scored(np.nan_to_num(ratio_T, nan=0.0), candidates=np.isfinite(ratio_T))


@register_selector("sampled_rkl_max", paper=PAPER)
def sampled_rkl_max(batch: Batch) -> Scored:
    """Tokens that the student likes more than the teacher does."""
    return _known(batch)


@register_selector("sampled_rkl_min", paper=PAPER, direction="low")
def sampled_rkl_min(batch: Batch) -> Scored:
    """Tokens that the teacher likes more than the student does."""
    return _known(batch)
