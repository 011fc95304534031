"""How a suite's tables are shown: Markdown, one self-contained HTML page, and plots against budget with intervals over seeds."""

from __future__ import annotations

import base64
import html as escape
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ta_opd.fixed_context import plots as pictures
from ta_opd.suite.plan import Settings

SHOWN = {
    "method": "method", "mask": "mask", "budget_asked": "budget asked", "budget_real": "budget real", "seed_label": "seeds",
    "status": "status", "rollouts": "rollouts", "reverse_kl_first": "reverse KL, first", "reverse_kl_last": "reverse KL, last",
    "forward_kl_before": "frozen KL before", "forward_kl_after": "frozen KL after", "gain": "gain", "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy after", "train_seconds": "train s",
}  # fmt: skip
PLOTTED = {
    "accuracy_after": "held-out accuracy after training",
    "gain": "gain on frozen contexts (nats a token)",
    "reverse_kl_last": "reverse KL over all valid tokens, last rollouts",
}
NOTES = (
    "budget real: kept tokens over valid tokens of the whole run. reverse KL: sampled-token estimate over all valid tokens, mean of "
    "the first and last five rollouts (half of a shorter run). frozen KL: full-vocabulary KL(teacher || student) on the same contexts before and after; gain "
    "is their difference. Intervals are 95 % t-intervals over seeds; a single seed has none."
)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that people read, rounded, empty where unknown."""
    return table[list(SHOWN)].rename(columns=SHOWN).map(_cell)


def _cell(value) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) and abs(value) > 1 else f"{value:.4g}"
    return str(value)


def _mean_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds as `mean [low, high]`."""
    out = seeds[["method", "budget_asked", "runs"]].rename(columns={"budget_asked": "budget asked"}).map(_cell)
    for name in ("budget_real", *PLOTTED, "train_seconds"):
        cells = []
        for _, row in seeds.iterrows():
            text = _cell(float(row[name]))
            if not math.isnan(row[f"{name}_low"]):
                text += f" [{_cell(float(row[f'{name}_low']))}, {_cell(float(row[f'{name}_high']))}]"
            cells.append(text)
        out[name.replace("_", " ")] = cells
    return out


def _pipes(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def markdown(settings: Settings, table: pd.DataFrame, seeds: pd.DataFrame) -> str:
    return (
        f"# Suite {settings.tag}\n\nStudent {Path(settings.student).name}, teacher {Path(settings.teacher).name or 'a server'}, "
        f"K = {settings.top_k}.\n\n## Runs\n\n{_pipes(shown(table))}\n\n## Means over seeds\n\n{_pipes(_mean_table(seeds))}\n\n{NOTES}\n"
    )


def plots(seeds: pd.DataFrame, directory: Path) -> list[Path]:
    """One PNG for each of PLOTTED that has a value, with intervals over seeds: lines over budgets where a method was run at several of them, else
    one row a method, sorted, with full OPD as a dashed line."""
    written = []
    for name, title in PLOTTED.items():
        known = seeds[seeds[name].notna()]
        if known.empty:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}_by_budget.png"
        note = "whiskers: 95 % t-intervals over seeds" if known[f"{name}_high"].notna().any() else "one seed: no intervals"
        full = known.loc[known["mask"] == "full", name]
        line = {"reference": float(full.iloc[0]), "reference_name": "full OPD"} if len(full) and len(known) > 1 else {}
        common = {"low": f"{name}_low", "high": f"{name}_high", "title": _title(title), "note": note, **line}
        if known.groupby("method")["budget_asked"].nunique().max() > 1:
            written.append(pictures.curves(known, "budget_asked", name, "method", path, xlabel="share of valid tokens asked for", ylabel=title, **common))
            continue
        labels = [m if b == 1 else f"{m}, {100 * b:.3g} %" for m, b in zip(known["method"], known["budget_asked"], strict=True)]
        known = known.assign(label=labels)
        written.append(pictures.dots(known, name, "label", path, xlabel=title, less_is_better=name.startswith("reverse_kl"), **common))
    return written


def _title(text: str) -> str:
    short = text.split(" (")[0].split(",")[0]
    return short[0].upper() + short[1:]


def html(settings: Settings, table: pd.DataFrame, seeds: pd.DataFrame, images: Sequence[Path]) -> str:
    """One page that works offline: both tables and the plots inside it."""
    figures = "\n".join(
        f'<figure><img alt="{escape.escape(PLOTTED[p.stem.removesuffix("_by_budget")])}" '
        f'src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}"></figure>'
        for p in images
    )
    title = escape.escape(f"Suite {settings.tag}")
    about = escape.escape(f"Student {Path(settings.student).name}, teacher {Path(settings.teacher).name or 'a server'}, K = {settings.top_k}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a; background: #fff; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) {{ text-align: left; }}
th {{ border-bottom: 2px solid #444; }}
.wide {{ overflow-x: auto; }} .failed {{ color: #b00020; font-weight: 600; }}
figure {{ display: inline-block; margin: .5rem; }} figure img {{ max-width: 100%; width: 36rem; }}
</style></head><body>
<h1>{title}</h1><p>{about}</p>
{figures}
<h2>Means over seeds</h2><div class="wide">{_html_table(_mean_table(seeds))}</div>
<h2>Runs</h2><div class="wide">{_html_table(shown(table))}</div>
<p>{escape.escape(NOTES)}</p>
</body></html>
"""


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th scope='col'>{escape.escape(c)}</th>" for c in table.columns)
    body = ""
    for row in table.itertuples(index=False):
        cells = "".join(f"<td{' class=failed' if c == 'failed' else ''}>{escape.escape(c)}</td>" for c in row)
        body += f"<tr>{cells}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
