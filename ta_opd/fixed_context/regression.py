"""Least-squares regressions of the gain, with cluster-robust intervals (statsmodels).

Models (each with an intercept, position and the teacher's entropy):
`H_D` {H, D, H*D}; `H_D_C` adds C; `H_Dlearn_Dincompat` {H, Dlearn, Dincompat} (paper, table 9).
"""

import warnings

import numpy as np
import pandas as pd

from ta_opd.fixed_context.bootstrap import group_codes

MODELS = {
    "H_D": ("H", "D", "H:D", "pos", "Ht"),
    "H_D_C": ("H", "D", "H:D", "pos", "Ht", "C"),
    "H_Dlearn_Dincompat": ("H", "Dlearn", "Dincompat", "pos", "Ht"),
}


def design(frame: pd.DataFrame, terms: tuple[str, ...], standardise: bool = False) -> np.ndarray:
    """[N, 1 + terms]: a column of ones and the terms ('H:D' is the product), z-scored (population std) if asked."""
    columns = []
    for term in terms:
        x = np.prod([frame[part].to_numpy(float) for part in term.split(":")], axis=0)
        columns.append(z_score(x) if standardise else x)
    return np.column_stack([np.ones(len(frame)), *columns])


def rank_deficient(frame: pd.DataFrame, terms: tuple[str, ...], standardise: bool = False) -> bool:
    """Whether some terms are constant or combinations of others, so that single coefficients mean nothing (r2 still does)."""
    x = design(frame, terms, standardise)
    return bool(np.linalg.matrix_rank(x) < x.shape[1])


def z_score(x: np.ndarray) -> np.ndarray:
    """(x - mean) / population std; zeros for a constant."""
    spread = x.std()
    return (x - x.mean()) / spread if spread > 1e-12 else np.zeros_like(x, float)


def fit(frame: pd.DataFrame, terms: tuple[str, ...], *, standardise: bool = False, response: str = "G"):
    """(statsmodels result, r2). Standard errors are clustered on `group`; with one group they are missing (NaN), not wrong."""
    import statsmodels.api as sm

    y = frame[response].to_numpy(float)
    y = z_score(y) if standardise else y
    x = design(frame, terms, standardise)
    codes, labels = group_codes(frame["group"])
    model = sm.OLS(y, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a singular design: callers report it (`rank_deficient`)
        if len(labels) > 1 and len(frame) > x.shape[1]:
            result = model.fit(cov_type="cluster", cov_kwds={"groups": codes})
        else:
            result = model.fit()
    residual = y - x @ result.params
    total = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((residual**2).sum()) / total if total > 0 else float("nan")
    return result, r2


def coefficient_rows(frame: pd.DataFrame, terms: tuple[str, ...], *, standardise: bool = False) -> tuple[list[dict], float]:
    """One dict a term (term, coef, std_err, ci_low, ci_high, p_value, n, groups, rank_deficient), and r2."""
    result, r2 = fit(frame, terms, standardise=standardise)
    groups = frame["group"].nunique()
    robust, deficient = groups > 1 and len(frame) > len(terms) + 1, rank_deficient(frame, terms, standardise)
    bounds = result.conf_int() if robust else np.full((len(terms) + 1, 2), np.nan)
    rows = [
        {
            "term": term,
            "coef": float(result.params[i]),
            "std_err": float(result.bse[i]) if robust else float("nan"),
            "ci_low": float(bounds[i][0]),
            "ci_high": float(bounds[i][1]),
            "p_value": float(result.pvalues[i]) if robust else float("nan"),
            "n": len(frame),
            "groups": groups,
            "rank_deficient": deficient,
        }
        for i, term in enumerate(("intercept", *terms))
    ]
    return rows, r2


def regression_tables(frame: pd.DataFrame, *, standardise: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(summary: model, r2, delta_r2_vs_HD, terms; coefficients: model and the columns of `coefficient_rows`) for every model."""
    summary, coefficients, base = [], [], None
    for name, terms in MODELS.items():
        rows, r2 = coefficient_rows(frame, terms, standardise=standardise)
        base = r2 if base is None else base
        summary.append({"model": name, "r2": r2, "delta_r2_vs_HD": r2 - base, "terms": " + ".join(("1", *terms))})
        coefficients += [{"model": name, **row} for row in rows]
    return pd.DataFrame(summary), pd.DataFrame(coefficients)


def residual(frame: pd.DataFrame, terms: tuple[str, ...] = MODELS["H_D"]) -> np.ndarray:
    """[N] what the model leaves of the gain."""
    result, _ = fit(frame, terms)
    return frame["G"].to_numpy(float) - design(frame, terms) @ result.params


def coefficient_gap(frame: pd.DataFrame, *, standardise: bool = True) -> dict:
    """beta(Dlearn) - beta(Dincompat) of the decomposition with its clustered 95 % interval (paper, table 9)."""
    terms = MODELS["H_Dlearn_Dincompat"]
    result, r2 = fit(frame, terms, standardise=standardise)
    learn, incompatible = 1 + terms.index("Dlearn"), 1 + terms.index("Dincompat")
    contrast = np.zeros(len(terms) + 1)
    contrast[learn], contrast[incompatible] = 1, -1
    row = {
        "beta_Dlearn": float(result.params[learn]),
        "beta_Dincompat": float(result.params[incompatible]),
        "beta_gap": float(result.params[learn] - result.params[incompatible]),
        "r2_decomp": r2,
    }
    low = high = float("nan")
    if frame["group"].nunique() > 1 and len(frame) > len(terms) + 1:
        low, high = map(float, np.ravel(result.t_test(contrast).conf_int()))
    return {**row, "beta_gap_ci_low": low, "beta_gap_ci_high": high}
