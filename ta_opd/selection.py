"""Which tokens of a rollout batch are kept: one budget, one ranking, every response with a voice.

Shape suffixes: T tokens of the batch (samples one after another), N samples, C candidates.

How a selection is made: the selector gives a score [T] (and perhaps candidates and weights); candidates are ranked by score, ties by
position in the response, then by row; the budget's worth of the best are kept. Min-keep gives every response with a valid token at least
`min_keep` kept tokens, either inside the budget (its best tokens go first) or on top of it (as released).
"""

import numbers
import random as python_random
from dataclasses import dataclass, field, fields, replace

import numpy as np

import ta_opd.selectors  # noqa: F401  (registers the published rules)
from ta_opd.errors import ConfigError, DataError
from ta_opd.ranking import ROUNDINGS, Order, Rows, budget_share, exact_ceil, reserve, response_budgets, token_budget, top_up
from ta_opd.scores import PROFILES, ScoreConfig, _choice, batch_scores, degenerate_medians, is_number
from ta_opd.selectors.registry import (
    Batch,
    Scored,
    Selector,
    get_selector,
    list_selectors,
    load_selector,
    register_selector,
    resolve_mask,
)
from ta_opd.topk import TopK, TopKParts

__all__ = [
    "MASK_CHOICES", "METHOD_ALIASES", "RELEASED_MASKS", "Selection", "SelectionConfig", "exact_ceil", "list_selectors",
    "register_selector", "resolve_mask", "select_tokens",
]  # fmt: skip

RELEASED_MASKS = (
    "none", "full", "random", "entropy", "divergence", "tip", "compatibility", "ca_softor", "split_budget_ca", "q3",
    "q3_highc", "q3_lowc", "dlearn_high", "teachability", "teachability_high", "q3_teachability_high",
    "q3_teachability_low", "q3_dlearn_high", "q3_dlearn_low", "q3_dincompat_high", "dincompat_high",
)  # fmt: skip

METHOD_ALIASES = {
    **dict.fromkeys(("pure_opd", "full_opd", "full", "none"), "full"),
    **dict.fromkeys(("teachability", "teachability_high", "dlearn", "dlearn_high"), "dlearn_high"),
    **dict.fromkeys(("entropy", "high_entropy"), "entropy"),
    **dict.fromkeys(("teachability_entropy", "entropy_teachability", "ta_softor", "dlearn_entropy"), "ca_softor"),
    **dict.fromkeys(("teachability_entropy_split", "entropy_teachability_split", "ta_split"), "split_budget_ca"),
    **dict.fromkeys(("tip", "tip_softor"), "tip"),
    **dict.fromkeys(("q3_highc", "q3_highC"), "q3_highc"),
    **dict.fromkeys(("divergence", "high_d", "raw_d"), "divergence"),
    **dict.fromkeys(("compatibility", "high_c"), "compatibility"),
}
METHOD_ALIASES |= {mask: mask for mask in RELEASED_MASKS if mask not in METHOD_ALIASES}

# What each profile sets where the user set nothing; every key is a field of SelectionConfig.
PROFILE_DEFAULTS = {
    "paper": {
        "population": "valid", "softor_source": "dlearn", "quadrant_cut": "rank", "scope": "batch", "rounding": "ceil",
        "min_keep_rule": "inside", "min_keep_score": "own", "low_ties": "earlier", "random_source": "rollout",
        "reported_score": "ranking",
    },
    "released": {
        "population": "all", "softor_source": "dc", "quadrant_cut": "median", "scope": "batch", "rounding": "float_ceil",
        "min_keep_rule": "on_top", "min_keep_score": "ca_softor", "low_ties": "later", "random_source": "shuffle",
        "reported_score": "released",
    },
}  # fmt: skip
_CHOICES = {
    "scope": ("batch", "response"),
    "rounding": ROUNDINGS,
    "min_keep_rule": ("inside", "on_top"),
    "min_keep_score": ("own", "ca_softor"),
    "low_ties": ("earlier", "later"),
    "random_source": ("rollout", "shuffle"),
    "reported_score": ("ranking", "released"),
}
# Field of SelectionConfig -> attribute of the command line's namespace.
_ARGUMENT = {
    "mask": "opd_budget_mask", "ratio": "opd_budget_ratio", "gamma": "opd_budget_gamma",
    "seed": "opd_budget_mask_seed", "min_keep": "opd_budget_min_keep_per_sample", "selector_path": "opd_selector_path",
    "profile": "opd_profile", "proxy": "opd_compat_proxy", "normalization": "opd_metric_normalization",
    "q_low": "opd_metric_q_low", "q_high": "opd_metric_q_high", "population": "opd_metric_population",
    "softor_source": "opd_softor_source", "quadrant_cut": "opd_quadrant_cut", "scope": "opd_budget_scope",
    "rounding": "opd_budget_rounding", "min_keep_rule": "opd_budget_min_keep_rule",
    "min_keep_score": "opd_budget_min_keep_score", "low_ties": "opd_budget_low_ties",
    "random_source": "opd_budget_random_source", "reported_score": "opd_budget_reported_score",
}  # fmt: skip


# The choices of --opd-budget-mask: the released ones in their order, then the field's. A user's own rule goes by selector_path.
MASK_CHOICES = tuple(dict.fromkeys([*RELEASED_MASKS, *(selector.name for selector in list_selectors())]))


# Columns whose mean over valid tokens is in the summary. Coverlap and the two masses are the overlap of the field's other stacks.
SUMMARY_MEANS = (
    "Hs_topk", "Ht_topk", "KLf_union", "Cmass", "Coverlap", "student_topk_mass", "teacher_topk_mass", "H_norm", "D_norm", "C_norm",
    "tip_score", "ca_softor_score", "reach_t1", "Cmass_exact",
)  # fmt: skip


@dataclass(frozen=True)
class SelectionConfig:
    """Everything that decides a selection. A field left None takes the selector's own recipe, else the profile's value.

    mask: selector name or alias; selector_path: a user's own function instead. ratio in (0, 1]; gamma in [0, 1] (entropy share of
    split_budget_ca); seed for random rules; min_keep >= 0 tokens for every response with a valid token.
    scope: one budget for the `batch` (paper eq. 13) or one per `response`. rounding of n_valid*ratio: exact `ceil`, `floor` (at least 1 in
    both), or `float_ceil` (the released one: 100*0.07 gives 8). min_keep_rule: `inside` the budget or `on_top`. min_keep_score: the
    selector's `own` or `ca_softor`. low_ties: which position wins a tie of a lowest-first rule. random_source: draw keyed by
    (seed, `rollout` id), or the released `shuffle`. reported_score: budget_score is the `ranking` score or has the `released` quirks.
    The rest: see ScoreConfig. Raises ConfigError with what was expected.
    """

    mask: str = "none"
    ratio: float = 1.0
    gamma: float = 0.5
    seed: int = 42
    min_keep: int = 1
    selector_path: str | None = None
    profile: str = "paper"
    proxy: str = "mass"
    normalization: str | None = None
    q_low: float | None = None
    q_high: float | None = None
    population: str | None = None
    softor_source: str | None = None
    quadrant_cut: str | None = None
    scope: str | None = None
    rounding: str | None = None
    min_keep_rule: str | None = None
    min_keep_score: str | None = None
    low_ties: str | None = None
    random_source: str | None = None
    reported_score: str | None = None

    def __post_init__(self):
        _choice("profile", self.profile, PROFILES)
        recipe = self.selector.defaults if self.profile == "paper" else {}
        defaults = {"normalization": "batch_quantile", "q_low": 0.05, "q_high": 0.95}
        for name, value in {**defaults, **PROFILE_DEFAULTS[self.profile], **recipe}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, allowed in _CHOICES.items():
            _choice(f"budget {name}", getattr(self, name), allowed)
        if not (is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ConfigError(f"budget ratio: expected a number in (0, 1], got {self.ratio!r}")
        if not (is_number(self.gamma) and 0 <= self.gamma <= 1):
            raise ConfigError(f"budget gamma: expected a number in [0, 1], got {self.gamma!r}")
        if not isinstance(self.min_keep, numbers.Integral) or self.min_keep < 0:
            raise ConfigError(f"min-keep per sample: expected a whole number, 0 (off) or more, got {self.min_keep!r}")
        if not isinstance(self.seed, numbers.Integral):
            raise ConfigError(f"mask seed: expected a whole number, got {self.seed!r}")
        self.score_config()

    @property
    def selector(self) -> Selector:
        return load_selector(self.selector_path) if self.selector_path else get_selector(self.mask)

    @property
    def keeps_everything(self) -> bool:
        """Whether the mask leaves every valid token in, unlooked at: none, full, and as released any released mask at ratio 1."""
        released = self.profile == "released" and self.ratio >= 1 and not self.selector_path and self.mask in RELEASED_MASKS
        return self.selector.name == "none" or released

    def score_config(self) -> ScoreConfig:
        return ScoreConfig(**{f.name: getattr(self, f.name) for f in fields(ScoreConfig)})

    @classmethod
    def from_args(cls, args) -> "SelectionConfig":
        """From an argparse.Namespace (or any object) with `opd_*` attributes; missing or None attributes take the defaults."""
        given = {name: getattr(args, attribute, None) for name, attribute in _ARGUMENT.items()}
        given = {name: value for name, value in given.items() if value is not None and value != ""}
        if "selector_path" in given and given.get("mask", "none") != "none":
            raise ConfigError(
                f"two selection rules: expected opd_selector_path or opd_budget_mask, got {given['selector_path']!r} and {given['mask']!r}; leave one out"
            )
        return cls(**given)

    def resolved(self) -> dict:
        """All fields with their final values, for logs and the bank's config.json."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Selection:
    """keep [T] bool; weights [T] float32, 0 where not kept; columns: score columns and budget_*, each [T]; the rest counts and notes."""

    keep: np.ndarray
    weights: np.ndarray
    columns: dict[str, np.ndarray]
    budget: int
    num_valid: int
    summary: dict = field(default_factory=dict)


def select_tokens(
    metrics: dict[str, np.ndarray],
    valid,
    response_lengths,
    config: SelectionConfig,
    *,
    rollout_id: int = 0,
    student: TopK | TopKParts | None = None,
    teacher: TopK | TopKParts | None = None,
    sampled_ids=None,
) -> Selection:
    """Scores of the batch and the tokens to keep.

    metrics: columns of `token_metrics`, each [T]. valid [T]: positions that may be trained on. response_lengths [N], sum T. rollout_id: the
    true one; random rules are keyed by it. student, teacher, sampled_ids: needed by selectors that look at the raw top-K (`ier`).
    Nothing valid gives an empty selection and a warning in the summary. Raises DataError on lengths that do not match.
    """
    lengths_N = np.asarray(response_lengths, np.int64)
    valid_T = np.asarray(valid).astype(bool, copy=False)
    T = int(lengths_N.sum())
    if valid_T.shape != (T,):
        raise DataError(f"valid: expected {T} positions (the sum of the response lengths), got shape {valid_T.shape}")
    wrong = {name: np.shape(column) for name, column in metrics.items() if np.shape(column) != (T,)}
    if wrong:
        raise DataError(f"metrics: expected {T} values in every column, got {wrong}")
    columns = batch_scores(metrics, valid_T, config.score_config())
    selector = config.selector
    rows = Rows.of(lengths_N)
    key = [int(config.seed) & 0xFFFFFFFFFFFFFFFF, int(rollout_id) & 0xFFFFFFFFFFFFFFFF]
    batch = Batch(
        columns, valid_T, lengths_N, rows.sample, rows.tok_pos, config, int(rollout_id), np.random.default_rng(key),
        student, teacher, None if sampled_ids is None else np.asarray(sampled_ids),
    )  # fmt: skip
    warnings: list[str] = []
    num_valid = int(valid_T.sum())
    if num_valid == 0:
        warnings.append("no valid token in the batch: nothing is kept")
        picked = _Picked.nothing(T)
    elif config.keeps_everything:
        picked = _Picked(valid_T.copy(), np.ones(T, np.float32), np.zeros(T, np.float32), num_valid, 0)
    else:
        picked = _pick(batch, rows, selector, config, warnings)
    if selector.candidates == "q3" and config.quadrant_cut == "rank" and num_valid:
        chosen = valid_T if config.population == "valid" else np.ones(T, bool)
        for axis in degenerate_medians(columns, chosen):
            warnings.append(f"at least half of the tokens share the lowest {axis}: quadrants go by its rank instead of its median")
    name = config.selector_path or config.mask
    scores = {column: values for column, values in columns.items() if column not in metrics}
    scores |= {
        "budget_method": np.broadcast_to(np.array(name, dtype=object), (T,)),
        "budget_ratio": np.broadcast_to(np.float64(config.ratio), (T,)),
        "budget_score": picked.reported,
        "budget_keep": picked.keep,
    }
    weights_T = picked.weights.astype(np.float32) * picked.keep
    summary = _summary(columns, picked, valid_T, num_valid, config, name, warnings)
    summary |= _positions(rows, valid_T, picked.keep)
    return Selection(picked.keep, weights_T, scores, picked.budget, num_valid, summary)


@dataclass
class _Picked:
    keep: np.ndarray
    weights: np.ndarray
    reported: np.ndarray
    budget: int
    forced: int

    @classmethod
    def nothing(cls, T: int) -> "_Picked":
        return cls(np.zeros(T, bool), np.zeros(T, np.float32), np.zeros(T, np.float32), 0, 0)


def _pick(batch: Batch, rows: Rows, selector: Selector, config: SelectionConfig, warnings: list[str]) -> _Picked:
    """Run the selector, then the budget and min-keep. Forced tokens are those that are kept for min-keep alone."""
    T = batch.valid.size
    answer = selector.function(batch)
    answer = answer if isinstance(answer, Scored) else Scored(np.asarray(answer))
    score_T = _checked(answer.score, T, selector.name, "score")
    candidates_T = batch.valid if answer.candidates is None else batch.valid & np.asarray(answer.candidates, bool)
    # A rule that names its own candidates decides which responses are heard at all, so min-keep stays within them.
    voiced_T = candidates_T
    if selector.candidates == "q3":
        candidates_T = candidates_T & (batch["quadrant"] == 3)
    released_random = selector.name == "random" and config.random_source == "shuffle"
    if released_random:
        score_T = _shuffled_priority(batch.valid, config.seed + batch.rollout_id)
    low = selector.direction == "low"
    order = Order(-score_T if low else score_T, rows, low and config.low_ties == "later")
    fallback = order if config.min_keep_score == "own" else Order(batch["ca_softor_score"], rows)
    room, spans = _room(batch.valid, rows, config)
    total = int(np.sum(room))

    def by_score(reserved_T: np.ndarray) -> np.ndarray:
        """[T] mask of what is reserved and the best of the rest, up to the budget."""
        keep_T = reserved_T.copy()
        free_C = np.flatnonzero(candidates_T & ~keep_T)
        if selector.name == "split_budget_ca":
            for span, budget in zip(spans, np.atleast_1d(room).tolist(), strict=True):
                _split(batch, rows, config, span, int(budget), keep_T)
        elif config.scope == "batch":
            keep_T[order.best(free_C, total - int(keep_T.sum()))] = True
        else:
            keep_T[order.best_per_response(free_C, room - rows.count(keep_T))] = True
        return keep_T

    keep_T = unforced_T = by_score(np.zeros(T, bool))
    if config.min_keep > 0 and config.min_keep_rule == "inside":
        preferred_T = candidates_T if fallback is order else voiced_T
        reserved_T = reserve(fallback, preferred_T, voiced_T, config.min_keep, room)
        if selector.name == "split_budget_ca" or (reserved_T & ~unforced_T).any():  # else the scores keep them anyway
            keep_T = by_score(reserved_T)
    elif config.min_keep > 0:
        keep_T = unforced_T | top_up(fallback, unforced_T, voiced_T, config.min_keep)
    forced = int((keep_T & ~unforced_T).sum())
    kept = int(keep_T.sum())
    if kept < total and answer.candidates is None:
        warnings.append(f"only {kept} of a budget of {total} tokens are candidates of {selector.name!r}")
    weights_T = np.ones(T, np.float32) if answer.weights is None else _checked(answer.weights, T, selector.name, "weight")
    return _Picked(keep_T, weights_T, _reported(score_T, selector, released_random, config), total, forced)


def _room(valid_T, rows: Rows, config: SelectionConfig) -> tuple[int | np.ndarray, list[slice]]:
    """The budget, one number for the batch or [N], and the rows that each number is for."""
    if config.scope == "batch":
        return token_budget(int(valid_T.sum()), config.ratio, config.rounding), [slice(0, valid_T.size)]
    ends_N = np.cumsum(rows.response_lengths)
    starts_N = ends_N - rows.response_lengths
    spans = [slice(start, end) for start, end in zip(starts_N.tolist(), ends_N.tolist(), strict=True)]
    return response_budgets(rows.count(valid_T), config.ratio, config.rounding), spans


def _checked(values, T: int, name: str, what: str) -> np.ndarray:
    values_T = np.asarray(values)
    if values_T.shape != (T,):
        raise DataError(f"selector {name!r}: expected a {what} for each of {T} tokens, got shape {values_T.shape}")
    if values_T.dtype == bool or values_T.dtype.kind in "iu":
        values_T = values_T.astype(np.float64)
    if np.isnan(values_T).any():
        raise DataError(f"selector {name!r}: {int(np.isnan(values_T).sum())} of {T} {what}s are NaN; give 0 instead")
    if what == "weight" and not (np.isfinite(values_T) & (values_T >= 0)).all():
        raise DataError(f"selector {name!r}: weights must be finite and not negative, got {values_T.min()} to {values_T.max()}")
    return values_T


def _split(batch: Batch, rows: Rows, config: SelectionConfig, span: slice, budget: int, keep_T) -> None:
    """A share gamma of the budget by H_norm, the rest by split_ca_score, any shortfall by ca_softor_score; what is kept already stays."""
    entropy_share = budget_share(budget, config.gamma, config.rounding)
    for column, count in (("H_norm", entropy_share), ("split_ca_score", budget), ("ca_softor_score", budget)):
        free_C = np.flatnonzero(batch.valid[span] & ~keep_T[span]) + span.start
        room = budget - int(keep_T[span].sum())
        keep_T[Order(batch[column], rows).best(free_C, min(count, room))] = True


def _shuffled_priority(valid_T, seed: int) -> np.ndarray:
    """The released draw: the standard library's shuffle of the valid rows, the first of them best."""
    rows = np.flatnonzero(valid_T).tolist()
    python_random.Random(seed).shuffle(rows)
    priority_T = np.zeros(valid_T.size)
    priority_T[rows] = np.arange(len(rows), 0, -1)
    return priority_T


def _reported(score_T, selector: Selector, released_random: bool, config: SelectionConfig) -> np.ndarray:
    if released_random or (config.reported_score == "released" and selector.name == "random"):
        return np.zeros(score_T.size, np.float32)
    if config.reported_score == "released" and selector.direction == "low":
        return 1 - score_T
    return score_T


def _summary(columns, picked: _Picked, valid_T, num_valid: int, config, name: str, warnings) -> dict:
    kept = int(picked.keep.sum())
    summary = {
        "num_tokens": int(valid_T.size),
        "num_valid_tokens": num_valid,
        "num_kept_tokens": kept,
        "keep_ratio": kept / num_valid if num_valid else 0.0,
        "budget": picked.budget,
        "forced_tokens": picked.forced,
        "q3_tokens": int(((columns["quadrant"] == 3) & valid_T).sum()),
        "budget_method": name,
        "budget_ratio": config.ratio,
        "warnings": warnings,
    }
    for column in SUMMARY_MEANS:
        if column in columns:
            summary[f"mean_{column}"] = float(columns[column][valid_T].mean(dtype=np.float64)) if num_valid else 0.0
    return summary


def _positions(rows: Rows, valid_T, keep_T) -> dict[str, float]:
    """Mean place in the response, 0 first to 1 last, of valid and of kept tokens: a rule may only be one for early tokens."""
    place_T = rows.place()
    return {f"{name}_position": float(place_T[mask].mean()) if mask.any() else 0.0 for name, mask in (("valid", valid_T), ("kept", keep_T))}


def with_mask(config: SelectionConfig, mask: str, ratio: float) -> SelectionConfig:
    """The same settings for another selector and ratio (fields that the old selector's recipe set stay)."""
    return replace(config, mask=mask, ratio=ratio)
