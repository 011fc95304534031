"""Matched top-N: every selector keeps the same number of tokens of one scored bank, and the gain of what it kept is compared.

Profile `paper`: every registered selector of `ta_opd.selection` on before-training quantities, no min-keep, paired draws.
Profile `released`: the released list of scores, ranked by pandas' (unstable) sort, n = max(1, round(N * ratio)).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.bootstrap import mean_interval, named_rng
from ta_opd.fixed_context.features import (
    before_training_where_released,
    build_features,
    low_entropy_high_divergence,
    resolve_columns,
    with_gains,
)
from ta_opd.fixed_context.selections import selection_gains
from ta_opd.fixed_context.selector_inputs import selector_inputs
from ta_opd.fixed_context.tables import to_markdown, write_json, write_table
from ta_opd.selection import SelectionConfig, list_selectors, resolve_mask, select_tokens

# Released name -> score as a function of the feature table; q3 = 1 inside the Q3 region.
RELEASED_SCORES = {
    "dlearn_high": lambda f, q3: f["Dlearn"],
    "divergence": lambda f, q3: f["D"],
    "tip_softor": lambda f, q3: f["tip_score"],
    "ca_softor": lambda f, q3: f["ca_softor_score"],
    "entropy": lambda f, q3: f["H"],
    "highC": lambda f, q3: f["C"],
    "dincompat_high": lambda f, q3: f["Dincompat"],
    "q3_highC": lambda f, q3: 2 * q3 + f["C"],
    "q3_dlearn": lambda f, q3: 2 * q3 + f["Dlearn"],
    "q3_divergence": lambda f, q3: 2 * q3 + f["D"],
}
DEFAULT_RATIOS = (0.01, 0.03, 0.05, 0.10)


@dataclass(frozen=True)
class TopNConfig:
    """Options of `matched_topn`. selectors: names (default all); source: see `selector_inputs`; winsor: quantiles of the gain, None = raw."""

    profile: str = "paper"
    ratios: tuple[float, ...] = DEFAULT_RATIOS
    selectors: tuple[str, ...] | None = None
    source: str = "full"
    bootstrap: int = 500
    seed: int = 20260515
    winsor: tuple[float, float] | None = (0.01, 0.99)

    def __post_init__(self):
        bad = [r for r in self.ratios if not 0 < r <= 1]
        if bad or not self.ratios:
            raise ConfigError(f"ratios: expected numbers in (0, 1], got {list(self.ratios)}")


def matched_topn(table: pd.DataFrame, config: TopNConfig | None = None, *, dataset: str = "") -> pd.DataFrame:
    """One row a selector and ratio: dataset, selector, ratio, n_keep, keep_ratio, mean_gain with its interval, gain_per_keep_ratio, ...

    A selector that cannot run on this table (it needs raw top-K lists, say) has a `note` and no numbers. Raises DataError when the table
    lacks a needed column.
    """
    config = config or TopNConfig()
    table = with_gains(table)
    columns = resolve_columns(table, config.profile, **before_training_where_released(table, config.profile))
    features = build_features(table, columns, profile=config.profile, winsor=config.winsor)
    rows = _released(features.frame, config, dataset) if config.profile == "released" else _registered(table, features, config, dataset)
    return pd.DataFrame(rows)


def _released(frame: pd.DataFrame, config: TopNConfig, dataset: str) -> list[dict]:
    q3 = low_entropy_high_divergence(frame).astype(float)
    names = config.selectors or (*RELEASED_SCORES, "random")
    unknown = [name for name in names if name not in RELEASED_SCORES and name != "random"]
    if unknown:
        raise ConfigError(f"selectors of profile released: expected some of {', '.join((*RELEASED_SCORES, 'random'))}, got {unknown}")
    rows = []
    for ratio in config.ratios:
        n_keep = max(1, round(len(frame) * ratio))
        for name in names:
            if name == "random":
                picked = named_rng(config.seed, dataset, name, ratio).permutation(len(frame))[:n_keep]
            else:
                score = pd.Series(np.asarray(RELEASED_SCORES[name](frame, q3)))
                picked = score.sort_values(ascending=False).index[:n_keep].to_numpy()
            kept = frame.iloc[picked]
            mean = mean_interval(kept["G"], kept["group"], config.bootstrap, named_rng(config.seed, dataset, name, ratio, "ci"))
            rows.append(
                {
                    "dataset": dataset, "selector": name, "ratio": ratio, "n_tokens": len(frame), "n_keep": n_keep,
                    "keep_ratio": n_keep / len(frame), "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high,
                    "gain_per_keep_ratio": mean.estimate / (n_keep / len(frame)), **_profile_of(kept, q3[picked]), "note": "",
                }
            )  # fmt: skip
    return rows


def _registered(table: pd.DataFrame, features, config: TopNConfig, dataset: str) -> list[dict]:
    usable = np.zeros(len(table), bool)
    usable[features.frame["row"]] = True
    inputs = selector_inputs(table, source=config.source, usable=usable)
    frame = features.frame.set_index("row").reindex(inputs.rows)
    # Tokens that may be chosen, in the order of the selectors.
    chosen = inputs.valid
    gain, groups = frame["G"].to_numpy()[chosen], frame["group"].to_numpy()[chosen]
    inside = frame[chosen]
    q3 = low_entropy_high_divergence(inside)
    names = [resolve_mask(name) for name in config.selectors] if config.selectors else [s.name for s in list_selectors()]
    done, weights, rows = [], [], []
    for ratio in config.ratios:
        for name in dict.fromkeys(names):
            try:
                options = SelectionConfig(mask=name, ratio=ratio, min_keep=0, seed=config.seed, scope="batch")
                kept = select_tokens(
                    inputs.metrics, inputs.valid, inputs.response_lengths, options, **inputs.arguments()
                )  # fmt: skip
            except (DataError, KeyError) as error:
                rows.append({"dataset": dataset, "selector": name, "ratio": ratio, "n_tokens": int(chosen.sum()), "note": f"not run: {error}"})
                continue
            done.append((name, ratio, "; ".join(kept.summary.get("warnings", ()))))
            weights.append(kept.weights[chosen])
    found = selection_gains(gain, weights, groups, config.bootstrap, np.random.default_rng(config.seed)) if done else []
    for (name, ratio, note), w, g in zip(done, weights, found, strict=True):
        mean = g.mean_gain
        rows.append(
            {
                "dataset": dataset, "selector": name, "ratio": ratio, "n_tokens": len(gain), "n_keep": g.n_keep, "keep_ratio": g.keep_ratio,
                "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high,
                "gain_per_keep_ratio": mean.estimate / g.keep_ratio if g.keep_ratio else float("nan"),
                "vs_random": g.vs_random.estimate, "vs_random_ci_low": g.vs_random.low, "vs_random_ci_high": g.vs_random.high,
                "share_of_gain": g.share_of_gain, **_profile_of(inside[w > 0], q3[w > 0]), "note": note,
            }
        )  # fmt: skip
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda row: (config.ratios.index(row["ratio"]), order[row["selector"]]))


def _profile_of(kept: pd.DataFrame, q3: np.ndarray) -> dict:
    """What was kept looks like: share inside Q3 and mean features."""
    return {"q3_share": float(q3.mean()) if len(q3) else float("nan"), **{f"mean_{n}": float(kept[n].mean()) for n in ("H", "D", "C")}}


def write_topn(result: pd.DataFrame, config: TopNConfig, inputs: dict[str, str], output_dir) -> Path:
    """Writes matched_fixed_context_topn.{csv,md} and matched_fixed_context_topn_manifest.json."""
    out = Path(output_dir)
    write_table(out / "matched_fixed_context_topn.csv", result)
    (out / "matched_fixed_context_topn.md").write_text(to_markdown(result))
    write_json(out / "matched_fixed_context_topn_manifest.json", {"inputs": inputs, "options": vars(config)})
    return out
