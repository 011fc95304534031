"""TIP's own recipe (arXiv 2604.14084), which is not TA-OPD's `tip`.

Reverse KL instead of forward, min-max over the batch instead of 5/95 % quantiles, the top 2 % of the entropy clipped first, and a budget of
floor(ratio * tokens) for every response (at least one token).
"""

import numpy as np

from ta_opd.scores import quantiles, soft_or
from ta_opd.selectors.common import minmax
from ta_opd.selectors.registry import Batch, register_selector

TIP = "TIP, arXiv 2604.14084"
RECIPE = {"scope": "response", "rounding": "floor"}


def clipped_entropy(batch: Batch) -> np.ndarray:
    """[T] normalised student entropy, cut at its 98th percentile over the valid tokens."""
    entropy_T = batch["Hs_topk_norm"]
    (ceiling,) = quantiles(entropy_T[batch.valid], (0.98,))
    return np.minimum(entropy_T, ceiling)


@register_selector("tip_opd", aliases=("tip_original",), paper=TIP, defaults=RECIPE)
def tip_opd(batch: Batch) -> np.ndarray:
    """TIP as published: soft-OR of entropy and reverse KL, min-max normalised, per response."""
    return soft_or(minmax(clipped_entropy(batch), batch.valid), minmax(batch["KLr_union"], batch.valid))


@register_selector("tip_q3", paper=TIP, defaults=RECIPE)
def tip_q3(batch: Batch) -> np.ndarray:
    """TIP's Q3 rule: forward KL times (1 - entropy), for overconfident errors, per response."""
    return batch["KLf_union"] * (1 - clipped_entropy(batch))
