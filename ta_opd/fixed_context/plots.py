"""Pictures of the analyses (matplotlib, no display needed). Colours are told apart without colour vision (viridis, Okabe-Ito)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C7A00", "#000000")
MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")
SOFT = "#57606a"


def new_figure(width: float = 6.4, height: float = 4.2):
    """(figure, axes) without pyplot's global state, so that pictures can be made in any thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def gain_pictures(tokens: pd.DataFrame, out: Path) -> list[Path]:
    """heatmap_H_D_meanC.png, q3_gain_by_C_bin.png (left out when Q3 is empty), residual_HD_vs_C.png."""
    h, d, c = (tokens[f"feature_{name}"].to_numpy() for name in "HDC")
    made = [_heatmap(h, d, c, out / "heatmap_H_D_meanC.png")]
    inside = tokens["in_q3"].to_numpy()
    if inside.any():
        title = "Gain inside Q3 (low entropy, high divergence)"
        made.append(_binned(c[inside], tokens["feature_G"].to_numpy()[inside], "C, normalised", "mean gain", title, out / "q3_gain_by_C_bin.png"))
    title = "What entropy and divergence leave unexplained"
    made.append(_binned(c, tokens["residual_HD"].to_numpy(), "C, normalised", "mean residual gain", title, out / "residual_HD_vs_C.png"))
    return made


def _heatmap(h, d, c, path: Path, bins: int = 20) -> Path:
    figure, axes = new_figure()
    edges = np.linspace(0, 1, bins + 1)
    total, _, _ = np.histogram2d(h, d, bins=[edges, edges], weights=c)
    count, _, _ = np.histogram2d(h, d, bins=[edges, edges])
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    image = axes.imshow(mean.T, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.axvline(np.median(h), color=SOFT, lw=1, ls="--")
    axes.axhline(np.median(d), color=SOFT, lw=1, ls="--")
    axes.set(xlabel="student entropy H, normalised", ylabel="divergence D, normalised")
    _heading(axes, "Mean compatibility C", "dashed: medians of H and D; white: no tokens there")
    figure.colorbar(image, ax=axes, label="mean C, normalised")
    return save(figure, path)


def _binned(x, y, xlabel: str, ylabel: str, title: str, path: Path, bins: int = 10) -> Path:
    figure, axes = new_figure()
    which = np.clip((x * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    mean = np.bincount(which, weights=y, minlength=bins) / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(np.bincount(which, weights=y**2, minlength=bins) / np.maximum(count, 1) - mean**2, 0))
    shown = count > 0
    centre = (np.arange(bins) + 0.5) / bins
    axes.bar(centre[shown], mean[shown], width=0.8 / bins, color=OKABE_ITO[0])
    axes.errorbar(centre[shown], mean[shown], yerr=spread[shown] / np.sqrt(count[shown]), fmt="none", ecolor="black", capsize=2)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel=f"{xlabel} (above: tokens)", ylabel=ylabel, xlim=(0, 1))
    for at, tokens in zip(centre[shown], count[shown], strict=True):
        axes.annotate(f"{tokens:,}", (at, 0.012), xycoords=("data", "axes fraction"), ha="center", fontsize=7, color=SOFT)
    _heading(axes, title, "bars: mean; whiskers: standard error over tokens")
    return save(figure, path)


def _heading(axes, title: str, below: str = "") -> None:
    """A title at the left and a smaller line under it: together they fit the width, which one long title does not."""
    axes.set_title(title + ("\n" if below else ""), loc="left", fontsize=11, weight="bold")
    if below:
        axes.annotate(below, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8.5, color=SOFT, va="bottom")


def _reference(axes, draw, at: float, name: str, place: tuple) -> None:
    draw(at, color=SOFT, lw=1, ls="--", zorder=1)
    axes.annotate(name, place, xycoords=("data", "axes fraction") if draw == axes.axvline else ("axes fraction", "data"), xytext=(3, -3 if draw == axes.axvline else 2),
                  textcoords="offset points", va="top" if draw == axes.axvline else "bottom", fontsize=8, color=SOFT)  # fmt: skip


def save(figure, path) -> Path:
    figure.savefig(path, dpi=160)
    return Path(path)


def curves(
    frame: pd.DataFrame, x: str, y: str, by: str, path, *, low: str | None = None, high: str | None = None, title: str = "", note: str = "",
    xlabel: str | None = None, ylabel: str | None = None, places: Sequence[str] | None = None, reference: float | None = None, reference_name: str = "",
) -> Path:  # fmt: skip
    """One line a value of `by`, with whiskers from `low` to `high` where given. The values of `x` stand side by side at equal distances, and lines a
    little beside one another, so that equal ones can be told apart. places: names for the sorted values of `x` (shares are shown as percent)."""
    values = np.sort(frame[x].dropna().unique())
    names = list(frame[by].drop_duplicates())
    figure, axes = new_figure(7.6, 4.4 + 0.22 * -(-len(names) // 3))
    step = min(0.09, 0.6 / max(len(names), 1))
    for i, name in enumerate(names):
        part = frame[frame[by] == name].sort_values(x)
        at = np.searchsorted(values, part[x]) + (i - (len(names) - 1) / 2) * step
        colour, marker, dash = OKABE_ITO[i % len(OKABE_ITO)], MARKERS[(i + i // len(OKABE_ITO)) % len(MARKERS)], DASHES[i // len(OKABE_ITO) % len(DASHES)]
        axes.plot(at, part[y], marker=marker, color=colour, label=str(name), lw=1.2, ls=dash, ms=5.5)
        if low and high:
            error = np.clip(np.nan_to_num([part[y] - part[low], part[high] - part[y]]), 0, None)
            axes.errorbar(at, part[y], yerr=error, fmt="none", ecolor=colour, capsize=2.5, lw=1.1)
    shares = places is None and len(values) and 0 < values.min() and values.max() <= 1
    axes.set_xticks(range(len(values)), places or [f"{100 * v:.3g} %" if shares else f"{v:g}" for v in values])
    axes.set(xlabel=xlabel or x, ylabel=ylabel or y, xlim=(-0.5, len(values) - 0.5))
    axes.grid(axis="y", color="#d8dee4", lw=0.7)
    axes.set_axisbelow(True)
    if reference is not None:
        _reference(axes, axes.axhline, reference, reference_name, (0, reference))
    if frame[[n for n in (y, low, high) if n]].min(axis=None) < 0:
        axes.axhline(0, color="grey", lw=0.8)
    _heading(axes, title, note)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=min(3, len(names)), frameon=False)
    return save(figure, path)


def dots(
    frame: pd.DataFrame, x: str, by: str, path, *, low: str | None = None, high: str | None = None, title: str = "", note: str = "", xlabel: str | None = None,
    reference: float | None = None, reference_name: str = "", less_is_better: bool = False,
) -> Path:  # fmt: skip
    """One row a value of `by`, best `x` on top, with whiskers from `low` to `high` where they are known and a dashed line at `reference`."""
    frame = frame.sort_values(x, kind="stable", ascending=not less_is_better)
    figure, axes = new_figure(7.6, 1.3 + 0.27 * len(frame))
    y = np.arange(len(frame))
    error = np.clip(np.nan_to_num([frame[x] - frame[low], frame[high] - frame[x]]), 0, None) if low and high else None
    axes.errorbar(frame[x], y, xerr=error, fmt="o", color=OKABE_ITO[0], ecolor=OKABE_ITO[0], capsize=2.5, ms=6, lw=1.3)
    if reference is not None:
        _reference(axes, axes.axvline, reference, reference_name, (reference, 1))
    axes.set_yticks(y, frame[by])
    axes.set(xlabel=xlabel or x, ylim=(-0.7, len(frame) - 0.2))
    axes.grid(axis="x", color="#d8dee4", lw=0.7)
    axes.set_axisbelow(True)
    _heading(axes, title, note)
    return save(figure, path)


def selector_table(table: pd.DataFrame, path) -> Path:
    """Every selector (rows, best first) at every budget (columns): the mean gain of a kept token as a number; blue where its interval lies above that
    of a random choice of as many tokens, orange where below, white where the two cannot be told apart. table: of `recommend`."""
    best = table.groupby("selector")["gain_per_kept_token"].max().sort_values(ascending=False)
    ratios = sorted(table["ratio"].unique())
    cells = table.set_index(["selector", "ratio"])
    figure, axes = new_figure(max(5.2, 2.6 + 0.85 * len(ratios)), 1.3 + 0.23 * len(best))
    reach = max(float(table["vs_random"].abs().max()), 1e-12)
    for row, name in enumerate(best.index):
        for column, ratio in enumerate(ratios):
            if (name, ratio) not in cells.index:
                continue
            cell = cells.loc[(name, ratio)]
            told = cell["verdict"] in ("better than random", "worse than random")
            strength = 0.12 + 0.55 * abs(float(cell["vs_random"])) / reach if told else 0.0
            colour = OKABE_ITO[0] if cell["vs_random"] > 0 else OKABE_ITO[4]
            axes.barh(row, 0.96, left=column + 0.02, height=0.92, color=colour, alpha=strength, lw=0)
            few = "*" if cell["keep_ratio"] < 0.9 * ratio else ""
            axes.text(column + 0.5, row, f"{cell['gain_per_kept_token']:.3g}{few}", ha="center", va="center", fontsize=8)
    axes.set(ylim=(len(best) - 0.5, -0.5), xlim=(0, len(ratios)))
    axes.set_yticks(range(len(best)), best.index, fontsize=8)
    axes.set_xticks(np.arange(len(ratios)) + 0.5, [f"{100 * r:.3g} %" for r in ratios])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle("Gain of a kept token, nats, by selector and budget", x=0.01, ha="left", fontsize=11, weight="bold")
    figure.supxlabel("blue: better than a random choice of as many tokens (95 %); orange: worse;\nwhite: cannot be told apart; *: keeps fewer than asked",
                     fontsize=8, color=SOFT, x=0.01, ha="left")  # fmt: skip
    return save(figure, path)
