"""Scores over a population of tokens: normalisation, teachability, soft-ORs, quadrants.

Shape suffixes: T tokens of the batch, P tokens of the population.
"""

import numbers
from dataclasses import dataclass

import numpy as np

from ta_opd.errors import ConfigError

SCHEMES = ("batch_quantile", "batch_minmax", "none")
PROXY_COLUMN = {"mass": "Cmass", "set": "Coverlap", "bc": "CBC", "prefix_ema": "Cprefix_ema"}
QUADRANT_NAMES = {1: "Q1_highH_highD", 2: "Q2_highH_lowD", 3: "Q3_lowH_highD", 4: "Q4_lowH_lowD"}
PROFILES = ("paper", "released")
SCORE_COLUMNS = (
    "H_norm", "D_norm", "C_norm", "DC_norm", "Dlearn", "Dincompat", "tip_score", "ca_softor_score", "split_ca_score",
    "quadrant",
)  # fmt: skip
_DEFAULTS = {
    "paper": {"population": "valid", "softor_source": "dlearn", "quadrant_cut": "rank"},
    "released": {"population": "all", "softor_source": "dc", "quadrant_cut": "median"},
}


@dataclass(frozen=True)
class ScoreConfig:
    """How metrics become scores. A field left None takes the profile's value.

    proxy: which column is C: mass, set (overlap), bc (Bhattacharyya), prefix_ema. normalization: batch_quantile (q_low to q_high),
    batch_minmax, none. population: `valid` (paper eq. 11) or `all` response tokens, for quantiles and medians. softor_source: the second
    operand of ca_softor_score, `dlearn` (paper eq. 16) or `dc` (norm of the raw product D*C, as released). quadrant_cut: `median`, or
    `rank`: the median, but where that equals the minimum (so that no token is below it) the upper half by rank of the raw value is high
    instead. Raises ConfigError on an unknown value.
    """

    profile: str = "paper"
    proxy: str = "mass"
    normalization: str = "batch_quantile"
    q_low: float = 0.05
    q_high: float = 0.95
    population: str | None = None
    softor_source: str | None = None
    quadrant_cut: str | None = None

    def __post_init__(self):
        _choice("profile", self.profile, PROFILES)
        for name, value in _DEFAULTS[self.profile].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _choice("compatibility proxy", self.proxy, tuple(PROXY_COLUMN))
        _choice("metric normalization", self.normalization, SCHEMES)
        _choice("metric population", self.population, ("valid", "all"))
        _choice("soft-OR source", self.softor_source, ("dlearn", "dc"))
        _choice("quadrant cut", self.quadrant_cut, ("median", "rank"))
        if not (is_number(self.q_low, self.q_high) and 0 <= self.q_low < self.q_high <= 1):
            raise ConfigError(f"quantiles: expected numbers 0 <= q_low < q_high <= 1, got {self.q_low!r} and {self.q_high!r}")


def is_number(*values) -> bool:
    """Whether all are numbers: YAML reads 5e-2 as text."""
    return all(isinstance(value, numbers.Real) for value in values)


def _choice(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")


def batch_scores(metrics: dict, valid: np.ndarray, config: ScoreConfig) -> dict[str, np.ndarray]:
    """Metrics and the score columns, each [T]; floats in the dtype of the metrics, in [0, 1], never NaN.

    H_norm, D_norm, C_norm, DC_norm = norm of Hs_topk_norm, KLf_union, C, KLf_union*C; Dlearn = D_norm*C_norm (paper eq. 5);
    Dincompat = D_norm*(1-C_norm); tip_score = soft-OR(H, D); ca_softor_score = soft-OR(H, Dlearn or DC); split_ca_score = (1-H)*DC_norm;
    quadrant int8 1..4 (QUADRANT_NAMES), ">= median" is high. Statistics are over the configured population only; tokens outside it
    are mapped with the same statistics.
    """
    chosen = np.asarray(valid, bool) if config.population == "valid" else np.ones(len(valid), bool)
    chosen = None if chosen.all() else chosen
    divergence_T, c_T = metrics["KLf_union"], metrics[PROXY_COLUMN[config.proxy]]
    with np.errstate(invalid="ignore", over="ignore"):
        product_T = divergence_T * c_T
    h_T = normalise(metrics["Hs_topk_norm"], chosen, config)
    d_T = normalise(divergence_T, chosen, config)
    c_T = normalise(c_T, chosen, config)
    dc_T = normalise(product_T, chosen, config)
    dlearn_T = d_T * c_T
    scores = {
        "H_norm": h_T,
        "D_norm": d_T,
        "C_norm": c_T,
        "DC_norm": dc_T,
        "Dlearn": dlearn_T,
        "Dincompat": d_T * (1 - c_T),
        "tip_score": soft_or(h_T, d_T),
        "ca_softor_score": soft_or(h_T, dlearn_T if config.softor_source == "dlearn" else dc_T),
        "split_ca_score": (1 - h_T) * dc_T,
        "quadrant": _quadrants(metrics, h_T, d_T, chosen, config.quadrant_cut),
    }
    return {**metrics, **scores}


def soft_or(a_T: np.ndarray, b_T: np.ndarray) -> np.ndarray:
    """a + b - a*b: high when either is."""
    return a_T + b_T - a_T * b_T


def normalise(x_T: np.ndarray, chosen: np.ndarray | None, config: ScoreConfig) -> np.ndarray:
    """clip((x - lo) / (hi - lo), 0, 1) with lo and hi from the finite x of the population (`chosen` mask, None = all).

    Non-finite x gives 0; hi - lo < 1e-12 gives 0 everywhere; scheme `none` is lo = 0, hi = max(largest, 1e-12).
    """
    finite_T = np.isfinite(x_T)
    keep_T = finite_T if chosen is None else finite_T & chosen
    population_P = x_T if keep_T.all() else x_T[keep_T]
    if population_P.size == 0:
        return np.zeros_like(x_T)
    if config.normalization == "batch_quantile":
        low, high = quantiles(population_P, (config.q_low, config.q_high))
    elif config.normalization == "batch_minmax":
        low, high = population_P.min(), population_P.max()
    else:
        low, high = x_T.dtype.type(0), max(population_P.max(), x_T.dtype.type(1e-12))
    with np.errstate(over="ignore"):
        span = high - low
    if abs(span) < 1e-12 or not np.isfinite(span):
        return np.zeros_like(x_T)
    with np.errstate(invalid="ignore", over="ignore"):
        y_T = x_T - low
        y_T /= span
        np.clip(y_T, 0, 1, out=y_T)
    y_T[~finite_T] = 0
    return y_T


def quantiles(x_P: np.ndarray, which: tuple[float, ...]) -> list:
    """Quantiles by linear interpolation at index q * (n - 1), in float64, then in the dtype of x_P, which is finite and not empty.

    In float32 a value between two equal ones could come out beside them, and all-equal values would not be seen as equal.
    """
    places = [q * (x_P.size - 1) for q in which]
    ends = sorted({int(np.floor(p)) for p in places} | {int(np.ceil(p)) for p in places})
    sorted_P = np.partition(x_P, ends)
    result = []
    for place in places:
        low, high = int(np.floor(place)), int(np.ceil(place))
        below, above, share = float(sorted_P[low]), float(sorted_P[high]), place - low
        result.append(x_P.dtype.type(below * (1 - share) + above * share if high > low else below))
    return result


def _quadrants(metrics, h_T, d_T, chosen, cut: str) -> np.ndarray:
    if h_T.size == 0 or (chosen is not None and not chosen.any()):
        return np.full(h_T.shape, 4, np.int8)
    pick = slice(None) if chosen is None else chosen
    high = []
    for raw_T, norm_T in ((metrics["Hs_topk_norm"], h_T), (metrics["KLf_union"], d_T)):
        by_rank = cut == "rank" and _median_is_minimum(norm_T[pick])
        high.append(_upper_half(raw_T, pick) if by_rank else norm_T >= quantiles(norm_T[pick], (0.5,))[0])
    quadrant_T = np.where(high[0], np.int8(2), np.int8(4))
    quadrant_T -= high[1]
    return quadrant_T


def _median_is_minimum(x_P: np.ndarray) -> bool:
    return bool(x_P.size and quantiles(x_P, (0.5,))[0] <= x_P.min())


def _upper_half(x_T, pick) -> np.ndarray:
    """True for the upper half of the population by rank of x (ties: the later is higher), and for outsiders at or above its lowest."""
    clean_T = np.nan_to_num(x_T, nan=0.0, posinf=np.finfo(x_T.dtype).max, neginf=0.0)
    where_P = np.arange(x_T.size)[pick]
    order_P = where_P[np.argsort(clean_T[where_P], kind="stable")]
    upper = order_P[order_P.size // 2 :]
    high_T = clean_T >= clean_T[upper[0]]
    high_T[order_P] = False
    high_T[upper] = True
    return high_T


def degenerate_medians(scores: dict, population: np.ndarray) -> list[str]:
    """Which of H_norm, D_norm have a median equal to their minimum over the population (a mask): a median cut puts nobody below it."""
    return [name for name in ("H_norm", "D_norm") if _median_is_minimum(scores[name][population])]
