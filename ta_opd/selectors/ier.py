"""IER-OPD (arXiv 2609.24432): how much of the teacher's signal at a position survives the sampling noise of one token.

With p the student's distribution over C = top-K of both sides and the sampled token (renormalised, a missing log-prob is -12),
rho = log p_student - log p_teacher (clipped at +-30), L = (1 - p) / p and b = E[rho L] / E[L], expectations under p:

    IER = Var[rho] / (E[(rho - b)^2 L] - Var[rho])

Published check: p = (1/2, 1/3, 1/6), rho = (0, 1, 2) gives 10/13. Fused with a host score u in [0, 1] by the batch rank r of IER:
OR = 1 - (1 - u)(1 - r), AND = u r.

Shape suffixes: T tokens, U slots of the union, B rows of one block.
"""

import numpy as np

from ta_opd.selectors.common import batch_rank
from ta_opd.selectors.registry import Batch, Scored, register_selector
from ta_opd.topk import PAD_ID, TopK
from ta_opd.union import Scratch, union_fast

IER = "IER-OPD, arXiv 2609.24432"
MISSING_LOGPROB = -12.0
MAX_LOG_RATIO = 30.0
EPS = 1e-8
ROWS = 2048


def ier_of(p_BU: np.ndarray, log_ratio_BU: np.ndarray) -> np.ndarray:
    """[B] IER of rows of probabilities (summing to 1; 0 outside the support) and log-ratios."""
    # p * L = 1 - p on the support.
    weight_BU = np.where(p_BU > 0, 1 - p_BU, 0)
    mean_B = (p_BU * log_ratio_BU).sum(axis=1)
    variance_B = (p_BU * (log_ratio_BU - mean_B[:, None]) ** 2).sum(axis=1)
    center_B = (weight_BU * log_ratio_BU).sum(axis=1) / np.maximum(weight_BU.sum(axis=1), EPS)
    noise_B = (weight_BU * (log_ratio_BU - center_B[:, None]) ** 2).sum(axis=1)
    return variance_B / np.maximum(noise_B - variance_B, EPS)


def ier_scores(batch: Batch) -> np.ndarray:
    """[T] IER of every position; 0 where a side returned nothing."""
    student, teacher, sampled_T = batch.topk()
    score_T = np.zeros(student.T)
    scratch = Scratch()
    for start in range(0, student.T, ROWS):
        block = slice(start, start + ROWS)
        sides = []
        for topk, name in ((student, "student"), (teacher, "teacher")):
            sampled_logprob_B = batch[f"{name}_logp_sampled"][block]
            absent_B = (batch[f"target_{name}_rank"][block] == 0) & np.isfinite(sampled_logprob_B)
            sides.append(_with_sampled(topk[block], sampled_T[block], sampled_logprob_B, absent_B))
        p_sides = [np.exp(np.minimum(side.logprobs, 0)) for side in sides]
        union = union_fast(sides[0].ids, sides[1].ids, *p_sides, scratch)
        member_BU = (union.p_student > 0) | (union.p_teacher > 0)
        logs = [
            np.where(p_BU > 0, np.log(np.maximum(p_BU, 1e-37)), MISSING_LOGPROB)
            for p_BU in (union.p_student, union.p_teacher)
        ]
        p_BU = np.where(member_BU, np.exp(logs[0], dtype=np.float64), 0)
        p_BU /= np.maximum(p_BU.sum(axis=1), 1e-300)[:, None]
        ratio_BU = np.clip(logs[0] - logs[1], -MAX_LOG_RATIO, MAX_LOG_RATIO)
        known_B = (student.ids[block, 0] >= 0) & (teacher.ids[block, 0] >= 0)
        score_T[block] = np.where(known_B, ier_of(p_BU, ratio_BU), 0)
    return score_T


def _with_sampled(topk: TopK, sampled_B, logprob_B, absent_B) -> TopK:
    """One more column for the sampled token, where the top-K does not hold it already."""
    ids_B = np.where(absent_B, sampled_B, PAD_ID).astype(np.int32)
    extra_B = np.where(absent_B, logprob_B, -np.inf).astype(np.float32)
    return TopK(
        np.column_stack([topk.ids, ids_B]), np.column_stack([topk.logprobs.astype(np.float32, copy=False), extra_B])
    ).checked()


@register_selector("ier", paper=IER)
def ier(batch: Batch) -> np.ndarray:
    """Information-to-error ratio of the position's teaching signal."""
    return ier_scores(batch)


def _fusion(host: str, column: str, how: str) -> None:
    def fused(batch: Batch) -> Scored:
        host_T, rank_T = batch[column], batch_rank(ier_scores(batch), batch.valid)
        return Scored(1 - (1 - host_T) * (1 - rank_T) if how == "or" else host_T * rank_T)

    fused.__doc__ = f"{host} {how.upper()} the batch rank of IER."
    register_selector(f"{host}_ier_{how}", paper=IER)(fused)


for _host, _column in {
    "entropy": "H_norm", "tip": "tip_score", "ta_opd": "Dlearn", "ca_softor": "ca_softor_score",
}.items():  # fmt: skip
    for _how in ("or", "and"):
        _fusion(_host, _column, _how)
