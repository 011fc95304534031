"""Sparse OPD supervision (arXiv 2609.04565): one or two tokens of every response, by the reward log p_teacher - log p_student.

The rules name their tokens themselves: leave the ratio at 1.
"""

import numpy as np

from ta_opd.ranking import Order, Rows
from ta_opd.selectors.registry import Batch, Scored, register_selector

PAPER = "sparse OPD supervision, arXiv 2609.04565"


def _one_of_each(batch: Batch, *scores_T: np.ndarray) -> Scored:
    candidates_T = np.zeros(batch.valid.size, bool)
    for score_T in scores_T:
        order = Order(np.nan_to_num(score_T, nan=0.0), Rows(batch.sample, batch.tok_pos, batch.response_lengths))
        candidates_T[order.best_of_each(batch.valid & ~np.isnan(score_T))] = True
    return Scored(candidates_T.astype(np.float32), candidates=candidates_T)


@register_selector("mintok", paper=PAPER)
def mintok(batch: Batch) -> Scored:
    """The token of highest reward of every response."""
    return _one_of_each(batch, batch["sampled_teacher_adv"])


@register_selector("maxtok", paper=PAPER)
def maxtok(batch: Batch) -> Scored:
    """The token of lowest reward of every response; can collapse, says the paper."""
    return _one_of_each(batch, batch["sampled_reverse_kl"])


@register_selector("minmaxtok", aliases=("minmax",), paper=PAPER)
def minmaxtok(batch: Batch) -> Scored:
    """Both ends of every response."""
    return _one_of_each(batch, batch["sampled_teacher_adv"], batch["sampled_reverse_kl"])


@register_selector("rand1tok", paper=PAPER)
def rand1tok(batch: Batch) -> Scored:
    """One random token of every response, the control."""
    return _one_of_each(batch, batch.rng.random(batch.valid.size))
