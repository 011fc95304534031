"""The masks of TA-OPD (arXiv 2605.26844) and its released code: rankings by one score column each.

`none`, `full`, `random` and `split_budget_ca` are listed here too, so that the registry is complete; the engine in
`ta_opd.selection` handles what is not a plain ranking (a shuffle keyed as released, a budget split in two).
"""

import numpy as np

from ta_opd.selectors.registry import Batch, register_selector

TA_OPD = "TA-OPD, arXiv 2605.26844"


def _ranking(column: str, name: str, *, paper: str = TA_OPD, summary: str, **options) -> None:
    def score(batch: Batch) -> np.ndarray:
        return batch[column]

    score.__doc__ = summary
    register_selector(name, paper=paper, **options)(score)


@register_selector("none", aliases=("full",), paper=TA_OPD)
def everything(batch: Batch) -> np.ndarray:
    """Every valid token, whatever the ratio."""
    return np.zeros(batch.valid.size, np.float32)


@register_selector("random", paper=TA_OPD)
def random(batch: Batch) -> np.ndarray:
    """A uniform draw of valid tokens, keyed by (seed, rollout id)."""
    return batch.rng.random(batch.valid.size)


_ranking("H_norm", "entropy", summary="High student entropy.")
_ranking("D_norm", "divergence", summary="High divergence, the raw-KL baseline.")
_ranking("tip_score", "tip", summary="High entropy or high divergence (TIP-style, in TA-OPD's normalisation; see tip_opd).")
_ranking("C_norm", "compatibility", summary="High compatibility: the teacher's mass on the student's top-K.")
_ranking("ca_softor_score", "ca_softor", summary="High entropy or high teachability (TA-OPD + Entropy, eq. 16).")
_ranking(
    "Dlearn", "dlearn_high", aliases=("teachability", "teachability_high"),
    summary="High teachability D*C: the paper's own rule (eq. 5, 12).",
)  # fmt: skip
_ranking("Dincompat", "dincompat_high", summary="High incompatible divergence D*(1-C), a control.")
_ranking("split_ca_score", "q3", candidates="q3", summary="Q3 (low entropy, high divergence) by (1-H)*DC.")
_ranking("C_norm", "q3_highc", aliases=("q3_highC",), candidates="q3", summary="Q3, most compatible first.")
_ranking("C_norm", "q3_lowc", candidates="q3", direction="low", summary="Q3, least compatible first, a control.")
_ranking(
    "Dlearn", "q3_teachability_high", aliases=("q3_dlearn_high",), candidates="q3", summary="Q3, most teachable first."
)
_ranking(
    "Dlearn", "q3_teachability_low", aliases=("q3_dlearn_low",), candidates="q3", direction="low",
    summary="Q3, least teachable first, a control.",
)  # fmt: skip
_ranking("Dincompat", "q3_dincompat_high", candidates="q3", summary="Q3, most incompatible first, a control.")


@register_selector("split_budget_ca", paper=TA_OPD)
def split_budget_ca(batch: Batch) -> np.ndarray:
    """A share gamma of the budget by entropy, the rest by split_ca_score, what is left by ca_softor_score."""
    return np.maximum(batch["H_norm"], batch["split_ca_score"])
