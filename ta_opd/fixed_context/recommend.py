"""Which selector would pay off for this teacher and student? From one fixed-context run: scored before, and after a short full-OPD run.

For every registered selector and budget: the tokens it would have kept before training, and the mean gain that full training then brought
on them. What this can and cannot say: full training moved every position, so the gain of a token is what it got while all were trained,
not what it would get alone. A rule that bets on tokens that do not gain even then is a bad bet; the reverse is a hint, not a proof.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context import plots
from ta_opd.fixed_context.bootstrap import mean_interval
from ta_opd.fixed_context.features import build_features, resolve_columns, with_gains
from ta_opd.fixed_context.selections import SelectionGain, honest_choice, selection_gains
from ta_opd.fixed_context.selector_inputs import selector_inputs
from ta_opd.fixed_context.tables import to_markdown, write_json, write_table
from ta_opd.selection import SelectionConfig, list_selectors, resolve_mask, select_tokens

FULL = "full"
DEFAULT_RATIOS = (0.05, 0.10, 0.20, 0.30, 0.50)
EARLY = 0.1  # the first tenth of a response


@dataclass(frozen=True)
class RecommendConfig:
    """source: `online` (what training would see) or `full` (see `selector_inputs`). support: divergence of source online. profile and
    min_keep: of the selections, as in training. winsor: quantiles of the gain, None = raw."""

    profile: str = "paper"
    ratios: tuple[float, ...] = DEFAULT_RATIOS
    selectors: tuple[str, ...] | None = None
    source: str = "online"
    support: str = "union_tail"
    min_keep: int = 1
    bootstrap: int = 1000
    seed: int = 42
    winsor: tuple[float, float] | None = (0.01, 0.99)

    def __post_init__(self):
        if not self.ratios or any(not 0 < r <= 1 for r in self.ratios):
            raise ConfigError(f"ratios: expected numbers in (0, 1], got {list(self.ratios)}")


@dataclass(frozen=True)
class Recommendation:
    """table: one row a selector and budget, best expected gain per kept token first; overall: mean gain of all tokens with its interval;
    warnings: what a user must see before spending GPU days; not_run: selectors that could not run on this table, with the reason."""

    table: pd.DataFrame
    overall: dict
    warnings: tuple[str, ...]
    not_run: dict[str, str]
    notes: tuple[str, ...]
    config: RecommendConfig


def recommend(table: pd.DataFrame, config: RecommendConfig | None = None) -> Recommendation:
    """Ranks all selectors and budgets on a joined table (before and after). Gains are absolute (nats of forward KL), the features those
    before training. Raises DataError when the table has no before-training columns."""
    config = config or RecommendConfig()
    table = with_gains(table)
    columns = resolve_columns(table, "paper")
    features = build_features(table, columns, profile="paper", winsor=config.winsor)
    usable = np.zeros(len(table), bool)
    usable[features.frame["row"]] = True
    inputs = selector_inputs(table, source=config.source, support=config.support, usable=usable)
    chosen = inputs.valid
    frame = features.frame.set_index("row").reindex(inputs.rows)[chosen]
    gain, groups = frame["G"].to_numpy(), frame["group"].to_numpy()
    names = [resolve_mask(n) for n in config.selectors] if config.selectors else [s.name for s in list_selectors()]
    names = [name for name in dict.fromkeys(names) if name != "none"]
    kept, not_run = [], {}
    for name in names:
        for ratio in config.ratios:
            try:
                options = SelectionConfig(mask=name, ratio=ratio, min_keep=config.min_keep, seed=config.seed, profile=config.profile)
                selection = select_tokens(inputs.metrics, inputs.valid, inputs.response_lengths, options, **inputs.arguments())
            except (DataError, ConfigError, KeyError) as error:
                not_run[name] = str(error)
                continue
            kept.append((name, ratio, selection.weights[chosen], "; ".join(selection.summary.get("warnings", ()))))
    if kept:
        honest = honest_choice(gain, [w for _, _, w, _ in kept], groups, np.random.default_rng(config.seed))
        often = sorted(honest.chosen.items(), key=lambda item: -item[1])[:5]
        picked = {f"{kept[i][0]} at {kept[i][1]:g}": share for i, share in often}
        best_of_many = {"gain_per_kept_token": honest.mean_gain, "vs_random": honest.vs_random, "chosen": picked}
    else:
        best_of_many = {}
    kept.append((FULL, 1.0, np.ones(len(gain)), ""))
    rng = np.random.default_rng(config.seed)
    found = selection_gains(gain, [w for _, _, w, _ in kept], groups, config.bootstrap, rng)
    pos = table[columns.pos].to_numpy(float)[inputs.rows][chosen]
    last = np.concatenate([np.arange(n) == n - 1 for n in inputs.response_lengths])[chosen]
    rows = [
        _row(name, ratio, w, note, g, frame, pos, last) for (name, ratio, w, note), g in zip(kept, found, strict=True)
    ]
    ranked = pd.DataFrame(rows).sort_values(["gain_per_kept_token", "ci_low"], ascending=False, kind="stable", ignore_index=True)
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    mean = mean_interval(gain, groups, config.bootstrap, np.random.default_rng(config.seed))
    overall = {
        "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high, "tokens": len(gain), "contexts_or_prompts": mean.num_groups,
        "gain_column": columns.gain, "share_of_tokens_with_gain": float((gain > 0).mean()),
        "c_spread": float(np.subtract(*np.quantile(frame["raw_c"], [0.95, 0.05]))),
        "best_of_many_held_out": best_of_many,
    }  # fmt: skip
    notes = (*features.notes, *inputs.notes, f"selector inputs: {config.source}, divergence {config.support}")
    return Recommendation(ranked, overall, tuple(_warnings(ranked, overall, not_run)), not_run, notes, config)


def _row(name, ratio, weights, note, g: SelectionGain, frame, pos, last) -> dict:
    inside = weights > 0
    mean_of = {f"mean_{n}": float(frame[n].to_numpy()[inside].mean()) if inside.any() else float("nan") for n in ("H", "D", "C")}
    against = g.vs_random
    verdict = "same as random"
    if against.excludes_zero:
        verdict = "better than random" if against.estimate > 0 else "worse than random"
    elif not np.isfinite(against.low):
        verdict = "unknown (one group)"
    return {
        "selector": name, "ratio": ratio, "keep_ratio": g.keep_ratio, "n_keep": g.n_keep, "gain_per_kept_token": g.mean_gain.estimate,
        "ci_low": g.mean_gain.low, "ci_high": g.mean_gain.high, "vs_random": against.estimate, "vs_random_ci_low": against.low,
        "vs_random_ci_high": against.high, "verdict": {FULL: "reference", "random": "one draw of it"}.get(name, verdict), "share_of_gain": g.share_of_gain,
        "contexts_with_none": g.contexts_with_none, "effective_contexts": g.effective_contexts,
        "early_share": float((pos[inside] <= EARLY).mean()) if inside.any() else float("nan"),
        "last_token_share": float(last[inside].mean()) if inside.any() else float("nan"), **mean_of, "note": note,
    }  # fmt: skip


def _warnings(ranked: pd.DataFrame, overall: dict, not_run: dict) -> list[str]:
    """Plain sentences, the gravest first."""
    out = []
    if not overall["ci_low"] > 0:
        out.append(
            f"The short full run did not bring the student measurably closer to the teacher: mean gain {overall['mean_gain']:.4g} nats, "
            f"95 % interval [{overall['ci_low']:.4g}, {overall['ci_high']:.4g}]. No ranking below can be trusted; train longer, with another "
            "learning rate, or with another teacher first."
        )
    if overall["contexts_or_prompts"] < 30:
        out.append(f"Only {overall['contexts_or_prompts']} prompts: intervals from so few clusters are too narrow. Use 100 or more.")
    rules = ranked[(ranked["selector"] != FULL) & (ranked["selector"] != "random")]
    worse = rules[rules["verdict"] == "worse than random"]
    if len(worse):
        out.append(f"Loses to a random choice of as many tokens: {_named(worse, differences=True)}.")
    better = rules[rules["verdict"] == "better than random"]
    if len(rules) and not len(better):
        out.append("No selective rule is measurably better than random for this pair: prefer full training, or random if compute must be saved.")
    for name in ("dlearn_high", "ca_softor"):
        own = rules[rules["selector"] == name]
        if len(own) and not (own["verdict"] == "better than random").any():
            out.append(
                f"{name} (teachability) is not better than random at any budget here. Others have measured teachability collapsing on small base "
                "students; expect that rather than the paper's numbers."
            )
    if len(better):
        best = better.iloc[0]
        if best["share_of_gain"] < 0.5:
            out.append(
                f"Full training still wins on the total: the best rule ({best['selector']} at {best['ratio']:g}) covers {best['share_of_gain']:.0%} of "
                "what full training gained. A budget buys gain per supervised token, not more gain, and not wall-clock time."
            )
    held_out = overall["best_of_many_held_out"].get("vs_random", float("nan"))
    if len(better) and not held_out > 0:
        out.append(
            f"The best of {len(rules)} candidates does not hold on prompts that did not choose it ({held_out:+.4g} against random in split halves): "
            "the top of the ranking is mostly luck. Score more contexts."
        )
    if overall["c_spread"] < 0.02:
        out.append(
            f"Compatibility is saturated (5 to 95 % quantile spread {overall['c_spread']:.3g}): scores built on C rank mostly noise. Use a smaller K."
        )
    for column, share, where in (("last_token_share", 0.5, "the last token of responses"), ("early_share", 0.6, "the first tenth of responses")):
        there = rules[rules[column] > share]
        if len(there):
            out.append(f"Most of the budget falls on {where}, which can shift response lengths: {_named(there)}.")
    if not_run:
        out.append("Not judged (the table lacks what they need): " + "; ".join(f"{n}: {why}" for n, why in not_run.items()))
    return out


def _named(rows: pd.DataFrame, *, differences: bool = False) -> str:
    """ "prefix at 0.1, 0.2 (-0.03 to -0.01); iw_opd at 0.1 (-0.02)": a selector once, with its budgets and, where asked, its differences to random."""
    said = []
    for name, own in rows.sort_values("ratio").groupby("selector", sort=False):
        low, high = own["vs_random"].min(), own["vs_random"].max()
        span = f"{low:+.3g} to {high:+.3g}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:+.3g}"
        said.append(f"{name} at {', '.join(f'{r:g}' for r in own['ratio'])}" + (f" ({span})" if differences else ""))
    return "; ".join(said)


def write_recommendation(result: Recommendation, output_dir) -> Path:
    """Writes selector_recommendation.{csv,md,json} and selector_recommendation.png."""
    out = Path(output_dir)
    write_table(out / "selector_recommendation.csv", result.table)
    write_json(
        out / "selector_recommendation.json",
        {"overall": result.overall, "warnings": list(result.warnings), "notes": list(result.notes), "not_run": result.not_run,
         "options": asdict(result.config), "best": result.table.iloc[0].to_dict()},
    )  # fmt: skip
    (out / "selector_recommendation.md").write_text(as_markdown(result))
    shown = result.table[result.table["selector"] != FULL]
    if len(shown):
        plots.selector_table(shown, out / "selector_recommendation.png")
    return out


def as_markdown(result: Recommendation, most: int | None = None) -> str:
    """The recommendation as a page: warnings, overall gain, ranking. most: so many rows of it, one a selector (its best budget), in fewer columns;
    then the references. None: every selector at every budget."""
    overall = result.overall
    lines = ["# Which selector for this teacher and student?\n"]
    lines += [f"- **Warning.** {text}" for text in result.warnings] or ["- No warning."]
    lines.append(
        f"\nAll {overall['tokens']} tokens ({overall['contexts_or_prompts']} prompts): mean gain {overall['mean_gain']:.4g} nats "
        f"[{overall['ci_low']:.4g}, {overall['ci_high']:.4g}] ({overall['gain_column']}); {overall['share_of_tokens_with_gain']:.0%} of the tokens "
        "came closer to the teacher.\n"
    )
    held_out = overall["best_of_many_held_out"]
    if held_out:
        picked = ", ".join(f"{name} ({share:.0%})" for name, share in held_out["chosen"].items())
        lines.append(
            f"Choosing the best candidate on half of the prompts and judging it on the other half gives {held_out['gain_per_kept_token']:.4g} nats a "
            f"kept token, {held_out['vs_random']:+.4g} against random (50 splits; chosen: {picked}).\n"
        )
    lines += [f"- {note}" for note in result.notes]
    shown = ["rank", "selector", "ratio", "keep_ratio", "gain_per_kept_token", "ci_low", "ci_high", "vs_random", "vs_random_ci_low",
             "vs_random_ci_high", "verdict", "share_of_gain", "note"]  # fmt: skip
    table = result.table
    if most is not None:
        shown = [c for c in shown if not c.startswith("vs_random_ci") and c != "note"]
        told = table.drop_duplicates("selector")
        reference = told["selector"].isin([FULL, "random"])
        table = pd.concat([told[~reference].head(most), told[reference]])
        lines.append(f"\nThe best {min(most, int((~reference).sum()))} of {int((~reference).sum())} selectors, each at its best budget:")
    lines.append("\n" + to_markdown(table[shown]))
    lines.append(
        "`vs_random`: difference to the mean gain of all tokens, which is what a random choice expects. `share_of_gain`: of the total gain of "
        "full training, how much lies on the kept tokens."
    )
    return "\n".join(lines) + "\n"
