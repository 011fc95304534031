"""Pictures of the analyses (matplotlib, no display needed). Colours are told apart without colour vision (viridis, Okabe-Ito)."""

from pathlib import Path

import numpy as np
import pandas as pd

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


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
    axes.axvline(np.median(h), color="white", lw=1, ls="--")
    axes.axhline(np.median(d), color="white", lw=1, ls="--")
    axes.set(xlabel="student entropy H, normalised", ylabel="divergence D, normalised", title="Mean compatibility C (dashed: medians)")
    figure.colorbar(image, ax=axes, label="mean C, normalised")
    figure.savefig(path, dpi=130)
    return path


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
    axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{title} (bars: mean, standard error over tokens)")
    axes.title.set_fontsize(10)
    figure.savefig(path, dpi=130)
    return path


def curves(frame: pd.DataFrame, x: str, y: str, by: str, path, *, low: str | None = None, high: str | None = None, title: str = "") -> Path:
    """One line a value of `by`, with a band from `low` to `high` where given."""
    figure, axes = new_figure(7.2, 4.6)
    markers = "osD^vPX*"
    for i, (name, part) in enumerate(frame.groupby(by, sort=False)):
        part = part.sort_values(x)
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        axes.plot(part[x], part[y], marker=markers[i % len(markers)], color=colour, label=str(name), lw=1.4, ms=5)
        if low and high:
            axes.fill_between(part[x], part[low], part[high], color=colour, alpha=0.15, lw=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    return Path(path)
