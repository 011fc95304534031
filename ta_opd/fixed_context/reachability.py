"""Can reach be predicted inside Q3? Logistic regression of reach_t1 (the teacher's best token is among the student's top-K) on H, D and
on H, D, C, judged on contexts that were not used for the fit.

Before training, C contains the teacher's mass on its own best token whenever that token is reached, so predicting reach_t1_base from C is
close to circular. Profile `paper` therefore predicts the reach AFTER training from features before it, and by default only where it was
not reached before.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.bootstrap import group_codes
from ta_opd.fixed_context.features import (
    before_training_where_released,
    build_features,
    low_entropy_high_divergence,
    resolve_columns,
    with_gains,
)

MODELS = {"H_D": ("H", "D"), "H_D_C": ("H", "D", "C")}
RIDGE = 1e-6


@dataclass(frozen=True)
class ReachabilityConfig:
    """min_q3_size: smaller regions are reported, not fitted. newly: only tokens not reached before training (profile paper)."""

    profile: str = "paper"
    folds: int = 5
    min_q3_size: int = 200
    seed: int = 42
    newly: bool = True

    def __post_init__(self):
        if self.folds < 2:
            raise ConfigError(f"folds: expected at least 2, got {self.folds}")


def reachability(table: pd.DataFrame, config: ReachabilityConfig | None = None) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """(models, tertiles, notes). models: model, n, positives, groups, folds, auc, brier, and the gain over H_D. tertiles: rate of reach by
    C tertile inside Q3. Too few tokens or one class only gives a note and empty numbers. DataError without a reach_t1 column."""
    config = config or ReachabilityConfig()
    table = with_gains(table)
    columns = resolve_columns(table, config.profile, **before_training_where_released(table, config.profile))
    if "reach_t1" not in table:
        raise DataError("reachability: the table has no column reach_t1")
    features = build_features(table, columns, profile=config.profile)
    frame = features.frame.assign(reach=table["reach_t1"].to_numpy(float)[features.frame["row"]])
    notes = list(features.notes)
    region = frame[low_entropy_high_divergence(frame)]
    if config.profile == "paper" and config.newly and "reach_t1_base" in table:
        before = table["reach_t1_base"].to_numpy(float)[region["row"]]
        notes.append(f"{int((before > 0).sum())} of {len(region)} Q3 tokens were reached before training and are left out")
        region = region[before == 0]
    region = region[np.isfinite(region["reach"])]
    if config.profile == "released":
        notes.append("reach_t1 and C describe one and the same checkpoint here: predicting one from the other is close to circular")
    tertiles = _tertiles(region)
    groups = region["group"].nunique()
    positives = int((region["reach"] > 0).sum())
    base = {"n": len(region), "positives": positives, "groups": groups, "folds": min(config.folds, groups)}
    if len(region) < config.min_q3_size or positives in (0, len(region)) or groups < 2:
        notes.append(
            f"not fitted: {len(region)} tokens ({positives} reached) in {groups} groups; needed are at least {config.min_q3_size} tokens, "
            "both classes and two groups"
        )
        return pd.DataFrame([{"model": name, **base} for name in MODELS]), tertiles, notes
    y = (region["reach"] > 0).to_numpy(float)
    fold_of = group_folds(region["group"], config.folds, config.seed)
    rows = []
    for name, terms in MODELS.items():
        predicted = out_of_fold(region[list(terms)].to_numpy(float), y, fold_of)
        rows.append({"model": name, **base, "auc": auc(y, predicted), "brier": float(((predicted - y) ** 2).mean())})
    for row in rows:
        row["auc_gain_over_HD"], row["brier_gain_over_HD"] = row["auc"] - rows[0]["auc"], rows[0]["brier"] - row["brier"]
    return pd.DataFrame(rows), tertiles, notes


def group_folds(groups, folds: int, seed: int) -> np.ndarray:
    """[N] int: whole groups dealt to `folds` folds in a seeded order."""
    codes, labels = group_codes(groups)
    order = np.random.default_rng(seed).permutation(len(labels))
    fold_of_group = np.empty(len(labels), int)
    fold_of_group[order] = np.arange(len(labels)) % min(folds, len(labels))
    return fold_of_group[codes]


def out_of_fold(x: np.ndarray, y: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """[N] probabilities, each from a fit without its own fold; a training set of one class predicts its rate."""
    predicted = np.empty(len(y))
    for fold in np.unique(fold_of):
        train, test = fold_of != fold, fold_of == fold
        if y[train].min() == y[train].max():
            predicted[test] = y[train].mean()
            continue
        centre, spread = x[train].mean(0), np.maximum(x[train].std(0), 1e-12)
        beta = fit_logistic((x[train] - centre) / spread, y[train])
        z = np.column_stack([np.ones(test.sum()), (x[test] - centre) / spread]) @ beta
        predicted[test] = _sigmoid(z)
    return predicted


def fit_logistic(x: np.ndarray, y: np.ndarray, *, max_steps: int = 50) -> np.ndarray:
    """[1 + F] coefficients (intercept first) by Newton's method, with a ridge of 1e-6 a row so that separable data stay finite."""
    design = np.column_stack([np.ones(len(y)), x])
    beta = np.zeros(design.shape[1])
    ridge = RIDGE * len(y) * np.eye(len(beta))
    for _ in range(max_steps):
        p = _sigmoid(design @ beta)
        gradient = design.T @ (y - p) - ridge @ beta
        hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge
        step = np.linalg.solve(hessian, gradient)
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    return beta


def auc(y: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, ties counting half; NaN with one class."""
    positive = y > 0
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def _tertiles(region: pd.DataFrame) -> pd.DataFrame:
    if len(region) == 0:
        return pd.DataFrame(columns=["tertile", "n", "reach_rate", "mean_c"])
    edges = np.quantile(region["C"], [1 / 3, 2 / 3])
    which = np.searchsorted(edges, region["C"].to_numpy(), side="left")
    rows = [
        {"tertile": name, "n": int((which == i).sum()), "reach_rate": float(region["reach"][which == i].mean()),
         "mean_c": float(region["C"][which == i].mean())}
        for i, name in enumerate(("low", "middle", "high"))
    ]  # fmt: skip
    return pd.DataFrame(rows)
