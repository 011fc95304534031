"""Pictures of what came out: accuracy and frozen KL before and after, divergence over training, kept tokens, seconds, budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ta_opd.report.loading import ArmKey, Run, Suite, eval_at
from ta_opd.report.statistics import Estimate, Outcome
from ta_opd.report.style import (
    GRID,
    INK,
    MOST,
    SOFT,
    ArmStyle,
    Picture,
    drawing,
    legend_below,
    many,
    picture,
    rollout_axis,
    smooth,
)

# Phases of a step that do not overlap, in order; scoring runs behind generation and is part of it.
PHASES = (
    ("generate", "sample and score"), ("select", "select tokens"), ("split", "build batch"), ("train", "train"),
    ("sync", "weights to engines"), ("save", "checkpoint"), ("eval", "evaluate"),
)  # fmt: skip
PHASE_COLORS = ("#0072b2", "#d55e00", "#8c959f", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#d8dee4")

Arms = dict[ArmKey, list[Run]]
Styles = dict[ArmKey, ArmStyle]


def by_accuracy(outcomes: dict[ArmKey, Outcome]) -> bool:
    """Whether arms are compared by held-out accuracy: where all have one, or where not all have a frozen KL instead."""
    known = [o.accuracy_after.known for o in outcomes.values()]
    return all(known) or (any(known) and not all(o.kl_after.known for o in outcomes.values()))


def best_first(outcomes: dict[ArmKey, Outcome]) -> list[ArmKey]:
    """Arms by accuracy after training, highest first; without accuracy, by frozen KL after training, lowest first. Unknown ones come last."""
    if by_accuracy(outcomes):
        return sorted(outcomes, key=lambda k: -np.nan_to_num(outcomes[k].accuracy_after.value, nan=-1.0))
    return sorted(outcomes, key=lambda k: np.nan_to_num(outcomes[k].kl_after.value, nan=np.inf))


def bold_arms(outcomes: dict[ArmKey, Outcome]) -> list[ArmKey]:
    """The arms that get colours: all of up to MOST; of more, full OPD, TA-OPD and random (the best budget of each), then the best others."""
    order = best_first(outcomes)
    if len(order) <= MOST:
        return order
    always = [next((k for k in order if k.mask == mask), None) for mask in ("full", "dlearn_high", "random")]
    always = [k for k in always if k is not None]
    return always + [k for k in order if k not in always][: MOST - len(always)]


def glance(suite: Suite, outcomes: dict[ArmKey, Outcome], styles: Styles) -> Picture | None:
    """Before and after for every arm, best on top: accuracy at the left, KL on frozen contexts at the right."""
    order = best_first(outcomes)[::-1]
    panels = [("accuracy_before", "accuracy_after", "Held-out accuracy", True)] if any(outcomes[k].accuracy_after.known for k in order) else []
    if any(outcomes[k].kl_after.known for k in order):
        panels.append(("kl_before", "kl_after", "KL to the teacher, frozen contexts (nats)", False))
    if not panels:
        return None
    teacher = suite.facts.get("teacher_accuracy")
    with drawing() as plt:
        figure, axes = plt.subplots(
            1, len(panels), figsize=(10.6, (0.62 if len(order) <= 12 else 0.4) * len(order) + 1.25), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06}
        )
        for ax, (before, after, title, is_accuracy) in zip(axes[0], panels, strict=True):
            for y, key in enumerate(order):
                look = replace(styles[key], color=SOFT, marker="o") if styles[key].faint else styles[key]  # a dot needs a shape that is seen
                _before_after(ax, y, getattr(outcomes[key], before), getattr(outcomes[key], after), look, is_accuracy)
            ax.set_title(title)
            ax.set_yticks(range(len(order)), [styles[k].label for k in order])
            ax.set_ylim(-0.6, len(order) - 0.4)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0, labelsize=10)
            ax.spines["left"].set_visible(False)
            if is_accuracy:
                ax.set_xlim(0, 1.08)
                ax.set_xticks(np.arange(0, 1.01, 0.2), [f"{100 * t:.0f} %" for t in np.arange(0, 1.01, 0.2)])
                if teacher:
                    ax.axvline(teacher, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                    ax.text(teacher, len(order) - 0.42, "teacher ", ha="right", va="top", color=SOFT, fontsize=8.5)
            else:
                ends = [e for k in order for o in [outcomes[k]] for e in (o.kl_before.value, o.kl_after.value, o.kl_after.high)]
                ax.set_xlim(0, 1.06 * np.nanmax(ends))
        sizes = _sizes(outcomes)
        return picture(
            figure, "glance", "At a glance",
            f"Hollow: before training. Filled: after, with its 95 % interval ({sizes}). Best on top." + many(styles),
            "Dot plot. " + "; ".join(f"{styles[k].label}: accuracy {_range(outcomes[k].accuracy_after)}, frozen KL {_range(outcomes[k].kl_after)}"
                                    for k in order[::-1]),
        )  # fmt: skip


def _before_after(ax, y: int, before: Estimate, after: Estimate, style: ArmStyle, is_accuracy: bool) -> None:
    if before.known and after.known:
        ax.annotate("", xy=(after.value, y), xytext=(before.value, y), zorder=2,
                    arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 3})  # fmt: skip
    if np.isfinite(after.low):
        ax.plot([after.low, after.high], [y, y], color=style.color, linewidth=3.2, alpha=0.45, solid_capstyle="round", zorder=3)
    if before.known:
        ax.plot(before.value, y, marker=style.marker, markersize=7, markerfacecolor="white", markeredgecolor=style.color, markeredgewidth=1.4, zorder=4)
    if after.known:
        ax.plot(after.value, y, marker=style.marker, markersize=8.5, color=style.color, markeredgecolor="white", markeredgewidth=0.8, zorder=5)
        text = f"{100 * after.value:.1f} %" if is_accuracy else f"{after.value:.3f}"
        ax.annotate(text, (after.value, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.8, color=INK, zorder=6)


def _range(e: Estimate) -> str:
    if not e.known:
        return "unknown"
    return f"{e.value:.3f}" + (f" [{e.low:.3f}, {e.high:.3f}]" if np.isfinite(e.low) else "")


def _sizes(outcomes: dict[ArmKey, Outcome]) -> str:
    some = list(outcomes.values())
    prompts = max((o.accuracy_after.prompts for o in some), default=0)
    contexts = max((o.kl_after.prompts for o in some), default=0)
    seeds = max((max(o.accuracy_after.seeds, o.kl_after.seeds) for o in some), default=1)
    parts = ([f"{prompts} prompts"] if prompts else []) + ([f"{contexts} frozen contexts"] if contexts else [])
    how = "drawn with replacement" if seeds < 2 else f"and {seeds} seeds drawn with replacement"
    alone = seeds > 1 and not prompts and any(o.accuracy_after.known for o in some)
    tail = "; one seed: it does not cover the choice of the seed" if seeds < 2 else "; of accuracy seeds alone, as Student's t" if alone else ""
    return f"{' and '.join(parts) or 'no per-prompt data'} {how}{tail}"


def reverse_kl(arms: Arms, styles: Styles) -> Picture | None:
    """Sampled reverse KL over rollouts: all valid tokens (comparable), kept tokens (not), one line a run."""
    columns = (("rollout/reverse_kl_valid", "over all valid tokens"), ("rollout/reverse_kl_kept", "over kept tokens only"))
    if not any(np.isfinite(run.column(columns[0][0])).any() for runs in arms.values() for run in runs):
        return None
    with drawing() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(10.6, 3.8))
        for ax, (column, title) in zip(axes, columns, strict=True):
            for key, runs in arms.items():
                for number, run in enumerate(runs):
                    _line(ax, run, column, styles[key], number)
            ax.set_title(f"Reverse KL, {title}")
            rollout_axis(ax)
            ax.axhline(0, color=SOFT, linewidth=0.8)
            ax.set_ylabel("nats a token")
        legend_below(figure, axes[0])
        rollouts = max(len(run.metrics) for runs in arms.values() for run in runs)
        return picture(
            figure, "reverse_kl", "Reverse KL over training",
            "Mean of log p(student) − log p(teacher) of the sampled tokens. Thin: every rollout; thick: moving mean. Compare methods at the "
            f"left: the right panel averages over the tokens that each method chose. {rollouts} rollouts." + many(styles),
            "Line plot of reverse KL against rollout, one line a method.",
        )  # fmt: skip


def _line(ax, run: Run, column: str, style: ArmStyle, number: int, window: int = 9) -> None:
    x, y = run.metrics["rollout_id"].to_numpy(float), run.column(column)
    if not np.isfinite(y).any():
        return
    if not style.faint:
        ax.plot(x, y, color=style.color, linewidth=0.6, alpha=0.3)
    ax.plot(x, smooth(y, min(window, max(1, len(y) // 3))), markevery=_every(len(x)), markersize=5, **style.line(number))


def _every(count: int) -> int:
    return max(1, count // 6)


def accuracy_curve(arms: Arms, styles: Styles, teacher: float | None) -> Picture | None:
    """Held-out accuracy at every evaluation, where there are more than two of them."""
    if not any(len([e for e in run.evals if "accuracy" in e]) > 2 for runs in arms.values() for run in runs):
        return None
    with drawing() as plt:
        figure, ax = plt.subplots(figsize=(10.6, 3.6))
        for key, runs in arms.items():
            for number, run in enumerate(runs):
                first = eval_at(run, "after") or eval_at(run, "before")
                points = [(e["rollout_id"] + 1, e["accuracy"]) for e in run.evals if first and e.get("dataset") == first.get("dataset")]
                if points:
                    ax.plot(*zip(*sorted(points), strict=True), markersize=6, **styles[key].line(number))
        if teacher:
            ax.axhline(teacher, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            ax.text(0, teacher, " teacher", va="bottom", color=SOFT, fontsize=8.5)
        rollout_axis(ax, "rollouts trained on")
        ax.set(ylabel="accuracy", ylim=(0, 1.05))
        legend_below(figure, ax)
        return picture(figure, "accuracy_curve", "Held-out accuracy over training", "Answers of the student in training to the held-out prompts." + many(styles),
                       "Line plot of accuracy against rollouts.")  # fmt: skip


def kept_tokens(arms: Arms, styles: Styles) -> Picture | None:
    """Kept tokens of every rollout, and the share of valid tokens that this is."""
    if not any(np.isfinite(run.column("rollout/kept_tokens")).any() for runs in arms.values() for run in runs):
        return None
    with drawing() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(10.6, max(3.1, 0.27 * len(arms) + 0.8)), gridspec_kw={"width_ratios": (1.5, 1)})
        labels, shares, colors, asked = [], [], [], []
        for key, runs in arms.items():
            for number, run in enumerate(runs):
                axes[0].plot(run.metrics["rollout_id"], run.column("rollout/kept_tokens"), **(styles[key].line(number) | {"marker": None, "linewidth": 1.4}))
            kept, valid = (sum(np.nansum(r.column(f"rollout/{n}_tokens")) for r in runs) for n in ("kept", "valid"))
            if not valid:
                continue
            labels.append(styles[key].label)
            shares.append(kept / valid)
            colors.append(styles[key].color)
            asked.append(key.ratio)
        valid_mean = np.nanmean([np.nanmean(r.column("rollout/valid_tokens")) for runs in arms.values() for r in runs if len(r.metrics)])
        axes[0].set(title="Kept tokens of each rollout", ylabel="tokens")
        rollout_axis(axes[0])
        axes[0].set_ylim(0, 1.15 * valid_mean)
        axes[0].axhline(valid_mean, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes[0].annotate("valid tokens (mean)", (0, valid_mean), xytext=(3, -7), textcoords="offset points", va="top", fontsize=8.5, color=SOFT)
        y = np.arange(len(labels))[::-1]
        axes[1].barh(y, shares, color=colors, height=0.55)
        for place, share, wanted in zip(y, shares, asked, strict=True):
            axes[1].plot([wanted, wanted], [place - 0.36, place + 0.36], color=INK, linewidth=1.4)
            axes[1].annotate(f"{100 * share:.1f} %", (max(share, wanted), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.8)
        room = 0.7 + max(0, 3 - len(y)) / 2  # one bar alone is not blown up
        axes[1].set(title="Share of valid tokens kept", xlim=(0, 1.15), ylim=(-room, len(y) - 1 + room), yticks=y, yticklabels=labels)
        axes[1].set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes[1].grid(axis="y", visible=False)
        if len(arms) > 12:  # tall bars, beside which lines would be stretched
            axes[0].remove()
            axes[1].set_subplotspec(axes[1].get_gridspec()[:])
        return picture(figure, "kept_tokens", "Kept tokens", "Bar: share really kept over the whole run, tick: budget asked for." + many(styles),
                       "Kept tokens by rollout and share kept by method.")  # fmt: skip


def seconds(arms: Arms, styles: Styles) -> Picture | None:
    """Mean seconds of a step, by phase; `other` is what no phase accounts for."""
    rows = []
    for key, runs in arms.items():
        table = phase_seconds(runs)
        if table:
            rows.append((styles[key].label, table))
    if not rows:
        return None
    names = [label for _, label in PHASES] + ["other"]
    with drawing() as plt:
        each = 0.55 if len(rows) <= 12 else 0.3  # inches a bar
        figure, ax = plt.subplots(figsize=(10.6, each * len(rows) + 1.3))
        y = np.arange(len(rows))[::-1]
        left = np.zeros(len(rows))
        for name, color in zip(names, PHASE_COLORS, strict=True):
            width = np.array([table.get(name, 0.0) for _, table in rows])
            if width.max() < 0.005 * max(sum(t.values()) for _, t in rows):
                continue
            ax.barh(y, width, left=left, color=color, height=0.6, label=name, edgecolor="white", linewidth=0.6)
            left += width
        for place, total in zip(y, left, strict=True):
            ax.annotate(f"{total:.2f} s", (total, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.8)
        ax.set(yticks=y, yticklabels=[name for name, _ in rows], xlabel="mean seconds a step", xlim=(0, left.max() * 1.1), ylim=(-0.6, len(rows) - 0.4))
        ax.grid(axis="y", visible=False)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), columnspacing=1.1, handlelength=1.1)
        return picture(figure, "seconds", "Seconds by phase",
                       "Mean over rollouts, the first one left out (it warms up). Evaluations and checkpoints are spread over all steps. "
                       "Selection saves supervision, not sampling or attention: dropping tokens from the loss leaves most phases as they are.",
                       "Stacked bars of seconds a step by phase and method.")  # fmt: skip


def phase_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds a step by phase label, with `other`; empty where nothing was logged."""
    out: dict[str, float] = {}
    for phase, label in PHASES:
        values = np.concatenate([np.nan_to_num(run.column(f"seconds/{phase}")[1:]) for run in runs])
        if values.any():
            out[label] = float(values.mean())
    total = np.concatenate([run.column("seconds/total")[1:] for run in runs])
    total = total[np.isfinite(total)]
    if not len(total):
        return out
    return out | {"other": max(0.0, float(total.mean()) - sum(out.values()))}


def budget_curve(outcomes: dict[ArmKey, Outcome], styles: Styles) -> Picture | None:
    """Accuracy and frozen KL against the budget, where a mask was run with several."""
    masks: dict[str, list[ArmKey]] = {}
    for key in outcomes:
        if key.mask != "full":
            masks.setdefault(key.mask, []).append(key)
    if not any(len(keys) > 1 for keys in masks.values()):
        return None
    panels = [("accuracy_after", "Held-out accuracy after training"), ("kl_after", "Frozen KL after training, nats a token")]
    panels = [p for p in panels if any(getattr(o, p[0]).known for o in outcomes.values())]
    with drawing() as plt:
        figure, axes = plt.subplots(1, len(panels), figsize=(5.3 * len(panels), 3.5), squeeze=False)
        for ax, (name, title) in zip(axes[0], panels, strict=True):
            for keys in masks.values():
                keys = sorted((k for k in keys if getattr(outcomes[k], name).known), key=lambda k: k.ratio)
                values = [getattr(outcomes[k], name) for k in keys]
                if not values:
                    continue
                style = styles[keys[0]]
                spread = np.nan_to_num([[v.value - v.low for v in values], [v.high - v.value for v in values]])
                ax.errorbar([k.ratio for k in keys], [v.value for v in values], yerr=np.clip(spread, 0, None), color=style.color, marker=style.marker,
                            capsize=3, label=style.label.rsplit(" ", 2)[0])  # fmt: skip
            full = outcomes.get(ArmKey("full", 1.0))
            if full is not None and getattr(full, name).known:
                value = getattr(full, name)
                ax.axhline(value.value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="Full OPD")
                if np.isfinite(value.low):
                    ax.axhspan(value.low, value.high, color=INK, alpha=0.07, linewidth=0)
            ratios = sorted({k.ratio for k in outcomes if k.mask != "full"})
            ax.set(title=title, xlabel="share of valid tokens kept (asked)", xscale="log")
            ax.set_xticks(ratios, [f"{100 * r:.3g} %" for r in ratios])
            ax.minorticks_off()
        axes[0][0].legend()
        return picture(figure, "budget_curve", "Budget curve", "95 % intervals as above; dashed line and band: full OPD.", "Outcome against budget.")
