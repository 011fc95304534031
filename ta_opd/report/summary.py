"""The report's tables: one row an arm with intervals, and the sentence that says who did best and how sure that is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.fixed_context.tables import to_markdown
from ta_opd.report.figures_outcome import best_first, by_accuracy
from ta_opd.report.loading import ArmKey, Run, Suite
from ta_opd.report.statistics import Estimate, Outcome, difference
from ta_opd.report.style import MOST

FULL = ArmKey("full", 1.0)
ON_PAGE = {
    "method": "method", "budget": "budget", "budget_real": "really kept", "accuracy_before": "accuracy before", "accuracy_after": "accuracy after",
    "vs_full": "points over full OPD", "gap_closed": "gap to teacher closed", "kl_before": "frozen KL before", "kl_after": "frozen KL after",
    "kl_drop": "KL cut", "reverse_kl_last": "reverse KL at the end", "seconds": "seconds",
}  # fmt: skip
WINDOW = 0.1
NAMED = 6  # methods that a sentence names one by one


def summary(suite: Suite, outcomes: dict[ArmKey, Outcome]) -> pd.DataFrame:
    """One row an arm in the order of the suite; for every estimate the value and `<name>_low`, `<name>_high`."""
    teacher = suite.facts.get("teacher_accuracy")
    rows = []
    for key, runs in suite.arms.items():
        o = outcomes[key]
        kept, valid = (sum(float(np.nansum(r.column(f"rollout/{n}_tokens"))) for r in runs) for n in ("kept", "valid"))
        first, last = _ends(runs)
        row: dict[str, object] = {
            "method": key.label, "mask": key.mask, "budget": key.ratio, "budget_real": kept / valid if valid and kept else math.nan,
            "seeds": len(runs), "rollouts": max(len(r.metrics) for r in runs), "kept_tokens": kept, "valid_tokens": valid,
            "reverse_kl_first": first, "reverse_kl_last": last, "seconds": _seconds(runs),
        }  # fmt: skip
        estimates = {
            "accuracy_before": o.accuracy_before, "accuracy_after": o.accuracy_after, "kl_before": o.kl_before, "kl_after": o.kl_after,
            "kl_drop": o.kl_drop, "reverse_kl_frozen_before": o.reverse_before, "reverse_kl_frozen_after": o.reverse_after,
        }  # fmt: skip
        if FULL in outcomes and key != FULL:
            estimates["vs_full"] = difference(o.accuracy_after, outcomes[FULL].accuracy_after)
            estimates["kl_vs_full"] = difference(o.kl_after, outcomes[FULL].kl_after)
        for name, estimate in estimates.items():
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        gap = teacher - o.accuracy_before.value if teacher and o.accuracy_before.known else math.nan
        row["gap_closed"] = (o.accuracy_after.value - o.accuracy_before.value) / gap if gap and gap > 0 else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _ends(runs: list[Run]) -> tuple[float, float]:
    first, last = [], []
    for run in runs:
        values = run.column("rollout/reverse_kl_valid")
        values = values[np.isfinite(values)]
        if len(values):
            n = max(1, round(WINDOW * len(values)))
            first.append(values[:n].mean())
            last.append(values[-n:].mean())
    return (float(np.mean(first)), float(np.mean(last))) if first else (math.nan, math.nan)


def _seconds(runs: list[Run]) -> float:
    """Mean wall seconds of a run: as the run itself reported, else the sum of its steps."""
    each = [r.done.get("seconds") or float(np.nansum(r.column("seconds/total"))) for r in runs]
    known = [s for s in each if s]
    return float(np.mean(known)) if known else math.nan


def headline(suite: Suite, outcomes: dict[ArmKey, Outcome]) -> list[str]:
    """Two or three sentences: the best arm with its interval, whether it differs from the next and from full OPD, and the caveat."""
    accuracy = by_accuracy(outcomes)
    if not accuracy and not any(o.kl_after.known for o in outcomes.values()):
        return ["No held-out accuracy and no frozen-context scores were found, so this report shows training only."]
    order = best_first(outcomes)
    best = order[0]

    def value(key: ArmKey) -> Estimate:
        return outcomes[key].accuracy_after if accuracy else outcomes[key].kl_after

    what = "held-out accuracy" if accuracy else "KL on the frozen contexts"
    before = outcomes[best].accuracy_before if accuracy else outcomes[best].kl_before
    reached = f" reached the best {what}:" if len(order) > 1 else f": {what}"  # one method alone is the best of nothing
    sentences = [f"{best.label}{reached} {_show(value(best), accuracy)}"
                 + (f", from {_plain(before.value, accuracy)} before training." if before.known else ".")]  # fmt: skip
    others = [k for k in order[1:] if value(k).known]
    tied = [k for k in others if not _apart(value(best), value(k))]
    worse = [k for k in others if _apart(value(best), value(k))]
    if len(order) > 1:
        if tied:
            sentences.append(f"{_join(tied)} cannot be told apart from it: the 95 % interval of the difference includes zero.")
        if worse:
            gaps = "; ".join(f"{k.label} by {_gap(value(best), value(k), accuracy)}" for k in worse[:NAMED])
            more = f"; and {len(worse) - NAMED} more" if len(worse) > NAMED else ""
            sentences.append(f"Clearly behind: {gaps}{more}.")
        if len(others) >= MOST:
            sentences.append(f"The best of {len(others) + 1} methods is in part the luckiest of them: expect a smaller lead when it is run again.")
    seeds = max((len(runs) for runs in suite.arms.values()), default=1)
    if seeds == 1:
        sentences.append("One training seed a method: the intervals cover the choice of prompts, not of the seed.")
    return sentences


def _apart(a: Estimate, b: Estimate) -> bool:
    gap = difference(a, b)
    return bool(np.isfinite(gap.low) and (gap.low > 0 or gap.high < 0))


def _gap(a: Estimate, b: Estimate, accuracy: bool) -> str:
    gap = difference(a, b)
    size = sorted((abs(gap.low), abs(gap.high)))
    if accuracy:
        return f"{100 * abs(gap.value):.1f} points [{100 * size[0]:.1f}, {100 * size[1]:.1f}]"
    return f"{abs(gap.value):.3f} nats [{size[0]:.3f}, {size[1]:.3f}]"


def _join(keys: list[ArmKey]) -> str:
    names = [k.label for k in keys]
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _plain(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f} %" if accuracy else f"{value:.3f} nats"


def _show(e: Estimate, accuracy: bool) -> str:
    if not np.isfinite(e.low):
        return _plain(e.value, accuracy)
    if accuracy:
        return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    return f"{e.value:.3f} nats [{e.low:.3f}, {e.high:.3f}]"


def shown(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The summary as people read it: text cells, `value [low, high]`, columns that nobody has left out."""
    out = {}
    for name, title in columns.items():
        if name not in table or table[name].isna().all():
            continue
        out[title] = [_cell(name, row) for row in table.to_dict("records")]
    return pd.DataFrame(out)


def _cell(name: str, row: dict) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    if value != value:
        return "–"
    if name in ("budget", "budget_real"):
        return f"{100 * value:.1f} %" if name == "budget_real" else f"{100 * value:.3g} %"
    if name in ("seeds", "rollouts"):
        return str(int(value))
    if name == "seconds":
        return f"{value:.0f}"
    if name == "gap_closed":
        return f"{100 * value:.0f} %"
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    scale, digits, unit = (100, 1, " %") if name.startswith("accuracy") else (100, 1, "") if name == "vs_full" else (100, 0, " %")
    if name not in ("accuracy_before", "accuracy_after", "vs_full", "kl_drop"):
        scale, digits, unit = 1, 3, ""
    sign = "+" if name == "vs_full" else ""
    text = f"{scale * value:{sign}.{digits}f}{unit}"
    if low == low and name not in ("accuracy_before", "kl_before"):
        text += f" [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
    return text


def write_tables(tables: dict[str, pd.DataFrame], directory: Path) -> list[Path]:
    """`<name>.csv` and `<name>.md` of every table."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables.items():
        csv, md = directory / f"{name}.csv", directory / f"{name}.md"
        table.to_csv(csv, index=False)
        md.write_text(to_markdown(table))
        written += [csv, md]
    return written
