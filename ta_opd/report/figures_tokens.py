"""Pictures of which tokens were kept: the H-D plane coloured by C, positions, token kinds; and gain on frozen contexts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ta_opd.report.figures_outcome import Styles
from ta_opd.report.loading import ArmKey, BankSample, Suite
from ta_opd.report.style import INK, SOFT, Picture, drawing, legend_below, many, picture
from ta_opd.report.vocabulary import KINDS, Vocabulary, kinds_in_context

Samples = Mapping[ArmKey, BankSample]
BINS = 20
POSITION_BINS = 10
STRIP_TOKENS = 40
QUADRANT_LABELS = ((0.98, 0.985, "Q1", "right"), (0.98, 0.015, "Q2", "right"), (0.02, 0.985, "Q3", "left"), (0.02, 0.015, "Q4", "left"))


def valid_rows(table: pd.DataFrame) -> np.ndarray:
    """[rows] bool: valid targets."""
    return table["loss_mask_original"].fillna(1).to_numpy(float) > 0


def kept_rows(table: pd.DataFrame) -> np.ndarray:
    """[rows] bool: kept tokens; all valid ones where the bank does not say."""
    kept = table["budget_keep"]
    return valid_rows(table) & (np.ones(len(table), bool) if kept.isna().all() else kept.fillna(0).to_numpy(float) > 0)


def plane(samples: Samples, styles: Styles) -> Picture | None:
    """H against D in bins coloured by mean C: all valid tokens first, then where each selecting method kept its tokens."""
    usable = {k: s for k, s in samples.items() if s.table["H_norm"].notna().any() and s.table["D_norm"].notna().any()}
    if not usable:
        return None
    selecting = [k for k in usable if k.mask != "full"]
    shown = [k for k in selecting if not styles[k].faint][:5]
    first = next((k for k in usable if k.mask == "full"), next(iter(usable)))
    with drawing() as plt:
        panels = 1 + len(shown)
        columns = 2 if panels == 4 else min(3, panels)
        rows = -(-panels // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(10.6, 3.35 * rows), sharex=True, sharey=True, squeeze=False)
        table = usable[first].table
        image = _plane_panel(axes.flat[0], table[valid_rows(table)], f"All valid tokens ({styles[first].label} run)")
        for ax, key in zip(list(axes.flat)[1:], shown, strict=False):
            table = usable[key].table
            kept = kept_rows(table)
            _plane_panel(ax, table[kept], f"Kept: {styles[key].label}", all_valid=table[valid_rows(table)])
        for ax in list(axes.flat)[panels:]:
            ax.axis("off")
        for ax in list(axes.flat)[max(0, panels - columns) : panels]:  # the lowest panel of every column
            ax.set_xlabel("student entropy, H (normalised)")
            ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel("divergence, D (normalised)")
        bar = figure.colorbar(image, ax=axes, shrink=0.72, pad=0.015, aspect=28)
        bar.set_label("mean compatibility, C (normalised)")
        bar.outline.set_visible(False)
        return picture(
            figure, "plane", "Entropy–divergence plane, coloured by compatibility",
            "Each square: the tokens in that bin, its size their number (logarithmic), its colour their mean C. Lines: medians of all valid tokens, "
            f"which cut the four quadrants. {_spread_of_c(usable[first].table)}{usable[first].caption}.{_left_out(selecting, shown)}",
            "Binned scatter of entropy against divergence, coloured by compatibility, one panel a method.",
        )  # fmt: skip


def _left_out(selecting: list[ArmKey], shown: list[ArmKey]) -> str:
    """The sentence of a caption for the methods that a picture has no room for."""
    rest = len(selecting) - len(shown)
    return f" {rest} further method{'s are' if rest > 1 else ' is'} not shown." if rest else ""


def _spread_of_c(table: pd.DataFrame) -> str:
    """The spread of C; says so when it hardly varies, because teachability then rests on very small differences."""
    c = table["Cmass"].to_numpy(float)[valid_rows(table)]
    c = c[np.isfinite(c)]
    if not len(c):
        return ""
    low, high = np.quantile(c, [0.05, 0.95])
    note = "; it hardly varies here, and normalisation stretches these small differences to 0–1" if high - low < 0.05 else ""
    return f"C before normalisation: {low:.4f} to {high:.4f} (5 % to 95 % quantile){note}. "


def _plane_panel(ax, table: pd.DataFrame, title: str, all_valid: pd.DataFrame | None = None):
    h, d, c = (table[name].fillna(0).to_numpy(float) for name in ("H_norm", "D_norm", "C_norm"))
    x, y = (np.clip((v * BINS).astype(int), 0, BINS - 1) for v in (h, d))  # without normalisation they may lie outside
    cell = x * BINS + y
    count = np.bincount(cell, minlength=BINS * BINS)
    mean = np.bincount(cell, weights=c, minlength=BINS * BINS) / np.maximum(count, 1)
    where = np.flatnonzero(count)
    size = 14 + 116 * np.log1p(count[where]) / np.log1p(max(count.max(), 1))
    image = ax.scatter((where // BINS + 0.5) / BINS, (where % BINS + 0.5) / BINS, s=size, c=mean[where], cmap="cividis", vmin=0, vmax=1, marker="s",
                       linewidths=0.3, edgecolors="white")  # fmt: skip
    reference = table if all_valid is None else all_valid
    if len(reference):
        ax.axvline(np.median(reference["H_norm"].fillna(0)), color=SOFT, linewidth=0.9)
        ax.axhline(np.median(reference["D_norm"].fillna(0)), color=SOFT, linewidth=0.9)
    for px, py, name, ha in QUADRANT_LABELS:
        ax.text(px, py, name, transform=ax.transAxes, ha=ha, va="top" if py > 0.5 else "bottom", fontsize=8.5, color=INK, weight="bold", zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2})  # fmt: skip
    ax.set_title(f"{title}\nn = {len(table):,}", fontsize=9.3)
    ax.set(xlim=(-0.06, 1.06), ylim=(-0.08, 1.08))
    return image


def positions(samples: Samples, styles: Styles) -> Picture | None:
    """Share of valid tokens kept, by relative position in the response."""
    selecting = {k: s for k, s in samples.items() if k.mask != "full" and s.table["pos_norm"].notna().any()}
    if not selecting:
        return None
    edges = np.linspace(0, 1, POSITION_BINS + 1)
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 3.5))
        for key, sample in selecting.items():
            table = sample.table
            known = table["pos_norm"].notna().to_numpy()
            valid, kept = valid_rows(table) & known, kept_rows(table) & known
            place = np.clip(np.nan_to_num(table["pos_norm"].to_numpy(float) * POSITION_BINS).astype(int), 0, POSITION_BINS - 1)
            total = np.bincount(place[valid], minlength=POSITION_BINS)
            share = np.bincount(place[kept], minlength=POSITION_BINS) / np.maximum(total, 1)
            ax.plot((edges[:-1] + edges[1:]) / 2, share, markersize=6, **styles[key].line())
        for ratio in sorted({k.ratio for k in selecting}):
            ax.axhline(ratio, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.text(1.0, ratio, "budget", ha="right", va="bottom", fontsize=8.5, color=SOFT)
        ax.set(xlabel="position in the response (0 = first token, 1 = last)", ylabel="share of valid tokens kept", xlim=(0, 1), ylim=(0, None))
        ax.set_yticks(ax.get_yticks(), [f"{100 * t:.3g} %" for t in ax.get_yticks()])
        legend_below(figure, ax)
        some = next(iter(selecting.values()))
        return picture(figure, "positions", "Where in the response kept tokens sit", f"Tenths of each response. {some.caption} a method.{many(styles)}",
                       "Share of tokens kept against position, one line a method.")  # fmt: skip


def kind_table(samples: Samples, vocabulary: Vocabulary) -> pd.DataFrame:
    """One row a method and token kind: valid and kept tokens, share of kind among valid and among kept, share kept, lift.

    lift = share of the kind among kept tokens / among valid tokens; 1 is what a random choice gives.
    """
    rows = []
    for key, sample in samples.items():
        table = sample.table
        starts = table["tok_pos"].to_numpy() == 0
        kinds = kinds_in_context(table["token_id"].to_numpy(int), starts, vocabulary)
        valid, kept = valid_rows(table), kept_rows(table)
        for kind in KINDS:
            of_kind = kinds == kind
            n_valid, n_kept = int((of_kind & valid).sum()), int((of_kind & kept).sum())
            if n_valid:
                share_valid, share_kept = n_valid / valid.sum(), n_kept / max(kept.sum(), 1)
                rows.append({"method": key.label, "mask": key.mask, "ratio": key.ratio, "kind": kind, "valid": n_valid, "kept": n_kept,
                             "share_of_valid": share_valid, "share_of_kept": share_kept, "kept_share": n_kept / n_valid,
                             "lift": share_kept / share_valid})  # fmt: skip
    return pd.DataFrame(rows)


def token_kinds(table: pd.DataFrame, samples: Samples, styles: Styles) -> Picture | None:
    """What kinds of token each method kept, beside what there was."""
    selecting = [k for k in samples if k.mask != "full"]
    if table.empty or not selecting:
        return None
    first = table[table["method"] == next(iter(samples)).label].set_index("kind")["share_of_valid"]
    kinds = [k for k in KINDS if k in first.index and first[k] >= 0.002]
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 3.6))
        groups = [("all valid tokens", "#d8dee4", [first[k] for k in kinds])]
        told = [k for k in selecting if not styles[k].faint][:6]
        for key in told:
            own = table[table["method"] == key.label].set_index("kind")["share_of_kept"]
            groups.append((styles[key].label, styles[key].color, [own.get(k, 0.0) for k in kinds]))
        width = 0.82 / len(groups)
        for i, (label, color, values) in enumerate(groups):
            x = np.arange(len(kinds)) + (i - (len(groups) - 1) / 2) * width
            ax.bar(x, values, width=width * 0.92, color=color, label=label, edgecolor=SOFT if i == 0 else "white", linewidth=0.5)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_yticks(ax.get_yticks(), [f"{100 * t:.3g} %" for t in ax.get_yticks()])
        ax.set(ylabel="share of tokens")
        ax.grid(axis="x", visible=False)
        legend_below(figure, ax)
        some = samples[selecting[0]]
        return picture(
            figure, "token_kinds", "What kinds of token were kept",
            "Grey: all valid tokens. Coloured: the tokens each method kept. “result” is a digit after an equals sign. "
            f"{some.caption} a method.{_left_out(selecting, told)}",
            "Grouped bars of token kinds among valid and kept tokens.",
        )  # fmt: skip


def response_strip(samples: Samples, styles: Styles, vocabulary: Vocabulary | None) -> Picture | None:
    """One response of the first rollout, its tokens coloured by Dlearn, the kept ones framed: a row for each selecting method."""
    from matplotlib import colormaps
    from matplotlib.patches import FancyBboxPatch, Rectangle

    selecting = [k for k in samples if k.mask != "full" and not styles[k].faint][:6]
    if not selecting or vocabulary is None:
        return None
    chosen = _telling_response(samples[selecting[0]].table)
    if chosen is None:
        return None
    rollout, sample = chosen
    rows = []
    for key in selecting:
        table = samples[key].table
        own = table[(table["rollout_id"] == rollout) & (table["sample_index"] == sample)].head(STRIP_TOKENS)
        if len(own):
            rows.append((key, own))
    length = max(len(own) for _, own in rows)
    cividis = colormaps["cividis"]
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 0.55 * len(rows) + 0.75))
        for y, (_, own) in zip(range(len(rows))[::-1], rows, strict=True):
            kept = kept_rows(own)
            for x, (token, score) in enumerate(zip(own["token_id"], own["Dlearn"].fillna(0), strict=True)):
                red, green, blue, _ = cividis(score)
                dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
                ax.add_patch(Rectangle((x + 0.06, y + 0.1), 0.88, 0.72, facecolor=(red, green, blue), linewidth=0))
                if kept[x]:
                    for width, edge in ((4.2, INK), (1.6, "white")):
                        ax.add_patch(FancyBboxPatch((x + 0.05, y + 0.09), 0.9, 0.74, boxstyle="round,pad=0,rounding_size=0.06", fill=False,
                                                    edgecolor=edge, linewidth=width, zorder=3))  # fmt: skip
                text = vocabulary.text(int(token)).replace("\n", "⏎").strip("<|>")[:6]
                ax.text(x + 0.5, y + 0.46, text, ha="center", va="center", color="white" if dark else "black", fontsize=min(11, 22 / max(len(text), 2)),
                        family="DejaVu Sans Mono", weight="bold" if kept[x] else "normal", zorder=4)  # fmt: skip
        ax.set(xlim=(-0.1, length + 0.1), ylim=(-0.05, len(rows) + 0.02), xticks=[])
        ax.set_yticks([len(rows) - 1 - i + 0.46 for i in range(len(rows))], [styles[k].label for k, _ in rows])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(plt.cm.ScalarMappable(cmap="cividis", norm=plt.Normalize(0, 1)), ax=ax, shrink=0.85, pad=0.012, aspect=10)
        bar.set_label("Dlearn")
        bar.outline.set_visible(False)
        same = all(rows[0][1]["token_id"].tolist() == own["token_id"].tolist() for _, own in rows)
        return picture(
            figure, "response", "One response, and what each method keeps of it",
            f"Rollout {rollout}, sample {sample}. Colour: Dlearn; framed: kept. "
            + ("All methods saw the same response here, since they start from one student with equal seeds." if same else "Each method's own response."),
            "A response as a row of coloured tokens for each method, kept tokens framed.",
        )  # fmt: skip


def _telling_response(table: pd.DataFrame) -> tuple[int, int] | None:
    """(rollout, sample) of the response of the first rollout that kept most tokens among those that fit one line."""
    first = table[(table["rollout_id"] == table["rollout_id"].min()) & table["sample_index"].notna()]
    if first.empty:
        return None
    by_sample = first.assign(kept=kept_rows(first)).groupby("sample_index").agg(kept=("kept", "sum"), length=("tok_pos", "size"), score=("Dlearn", "sum"))
    fitting = by_sample[by_sample["length"] <= STRIP_TOKENS]
    ranked = (fitting if len(fitting) else by_sample).sort_values(["kept", "score"], kind="stable")
    return int(first["rollout_id"].iloc[0]), int(ranked.index[-1])


def quadrant_gain(suite: Suite, styles: Styles) -> Picture | None:
    """Absolute gain on frozen contexts by quadrant of the plane before training."""
    from ta_opd.fixed_context.bootstrap import mean_interval, named_rng

    rows = []
    for key, runs in suite.arms.items():
        frames = [run.contexts for run in runs if run.contexts is not None and {"Hs_full_base", "KLf_full_base", "KLf_full"} <= set(run.contexts)]
        if not frames:
            continue
        table = pd.concat(frames, ignore_index=True)
        h, before = table["Hs_full_base"].to_numpy(float), table["KLf_full_base"].to_numpy(float)
        gain = before - table["KLf_full"].to_numpy(float)
        usable = np.isfinite(gain) & np.isfinite(h)
        h_cut, d_cut = np.median(h[usable]), np.median(before[usable])
        high_h, high_d = h >= h_cut, before >= d_cut
        group = next(n for n in ("prompt_id", "sample_index", "sample_ordinal") if n in table)
        for name, inside in (("Q1\nhigh H, high D", high_h & high_d), ("Q2\nhigh H, low D", high_h & ~high_d),
                             ("Q3\nlow H, high D", ~high_h & high_d), ("Q4\nlow H, low D", ~high_h & ~high_d)):  # fmt: skip
            which = inside & usable
            if which.any():
                rows.append((key, name, mean_interval(gain[which], table[group].to_numpy()[which], 1000, named_rng(7, key.slug, name)), int(which.sum())))
    if not rows:
        return None
    names = list(dict.fromkeys(name for _, name, _, _ in rows))
    keys = [key for key in dict.fromkeys(key for key, _, _, _ in rows) if not styles[key].faint]
    rest = len(dict.fromkeys(key for key, _, _, _ in rows)) - len(keys)
    if not keys:
        return None
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 3.7))
        for i, key in enumerate(keys):
            for own, name, mean, _ in rows:
                if own == key:
                    x = names.index(name) + (i - (len(keys) - 1) / 2) * 0.8 / len(keys)
                    style = styles[key]
                    error = np.nan_to_num([[mean.estimate - mean.low], [mean.high - mean.estimate]])
                    ax.errorbar(x, mean.estimate, yerr=np.clip(error, 0, None), color=style.color, marker=style.marker, markersize=7, capsize=3,
                                label=style.label if name == names[0] else None, linestyle="none")  # fmt: skip
        ax.axhline(0, color=INK, linewidth=0.9)
        counts = {name: n for key, name, _, n in rows if key == keys[0]}
        ax.set_xticks(range(len(names)), [f"{name}\nn = {counts.get(name, 0):,}" for name in names])
        ax.set(ylabel="gain, nats a token")
        ax.grid(axis="x", visible=False)
        legend_below(figure, ax)
        return picture(
            figure, "quadrant_gain", "Gain on frozen contexts by quadrant",
            "Gain = KL(teacher ‖ student) before − after on the same contexts (full vocabulary); quadrants cut at the medians before training. "
            "Bars: 95 % intervals over prompts; n: positions of the first method, those of all its seeds together."
            + (f" {rest} further methods are not shown." if rest else ""),
            "Gain by quadrant and method with intervals.",
        )  # fmt: skip


def selector_gain(suite: Suite) -> Picture | None:
    """Gain of what every selector would have kept, by budget, from the matched top-N table of the diagnostic."""
    table = suite.topn
    if table is None or not {"selector", "ratio", "mean_gain", "ci_low", "ci_high"} <= set(table):
        return None
    table = table[table["mean_gain"].notna()]
    if table.empty:
        return None
    ratios = sorted(table["ratio"].unique())
    best = table.groupby("selector")["mean_gain"].mean().sort_values()
    shades, markers = ("#08306b", "#2171b5", "#6baed6", "#e69f00", "#d55e00"), "os^DX"  # dark to light to warm, and a shape each
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 0.3 * len(best) + 1.4))
        for i, ratio in enumerate(ratios):
            rows = table[table["ratio"] == ratio].set_index("selector").reindex(best.index)
            y = np.arange(len(best)) + (i - (len(ratios) - 1) / 2) * 0.6 / max(len(ratios), 1)
            error = np.clip(np.nan_to_num([rows["mean_gain"] - rows["ci_low"], rows["ci_high"] - rows["mean_gain"]]), 0, None)
            ax.errorbar(rows["mean_gain"], y, xerr=error, linestyle="none", marker=markers[i % len(markers)], markersize=4.5, capsize=2, color=shades[i % len(shades)],
                        label=f"budget {100 * ratio:.3g} %")  # fmt: skip
        ax.axvline(0, color=INK, linewidth=0.9)
        ax.set_yticks(range(len(best)), best.index)
        ax.set_ylim(-0.8, len(best) - 0.2)
        ax.set(xlabel="mean gain of the kept tokens, nats a token")
        ax.legend(loc="lower right")
        return picture(figure, "selector_gain", "Gain by selector and budget",
                       "The same frozen contexts before and after one training run: mean gain of the tokens that each rule would have kept, 95 % intervals "
                       "over prompts. Best on top.", "Gain by selector with intervals, one colour a budget.")  # fmt: skip
