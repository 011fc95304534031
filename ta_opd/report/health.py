"""Signs that a student is collapsing: shorter or endless responses, repetition, lost entropy, a divergence that grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ta_opd.report.loading import ArmKey, BankSample, Run, eval_at
from ta_opd.report.style import SOFT, Picture, drawing, legend_below, many, picture, rollout_axis, smooth

NGRAM = 4
WINDOW = 0.1  # share of rollouts that "start" and "end" mean


@dataclass(frozen=True)
class Check:
    """One comparison of the start of a run with its end. bad: a sign of collapse; text says what was seen."""

    run: str
    arm: ArmKey
    name: str
    start: float
    end: float
    bad: bool
    text: str


def ends(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and the last tenth (at least one value), NaN ignored."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if len(known) == 0:
        return float("nan"), float("nan")
    n = max(1, round(WINDOW * len(known)))
    return float(known[:n].mean()), float(known[-n:].mean())


def repetition(table: pd.DataFrame, n: int = NGRAM) -> pd.Series:
    """Share of a response's n-grams that occurred before in the same response, mean by rollout id; responses shorter than n are left out."""
    order = table.sort_values(["rollout_id", "sample_ordinal", "tok_pos"], kind="stable")
    ids = order["token_id"].to_numpy(np.int64)
    response = pd.factorize(pd.MultiIndex.from_frame(order[["rollout_id", "sample_ordinal"]]))[0]
    if len(ids) < n:
        return pd.Series(dtype=float)
    same = response[n - 1 :] == response[: len(response) - n + 1]
    base = int(ids.max()) + 1
    key = np.zeros(len(ids) - n + 1, np.uint64)
    for k in range(n):  # wraps around for large vocabularies, which only matters for collisions
        key = key * np.uint64(base) + ids[k : len(ids) - n + 1 + k].astype(np.uint64)
    frame = pd.DataFrame({"response": response[: len(key)][same], "key": key[same]})
    frame["again"] = frame.duplicated(["response", "key"])
    share = frame.groupby("response")["again"].mean()
    rollout = pd.Series(order["rollout_id"].to_numpy(), index=response).groupby(level=0).first()
    return share.groupby(rollout.reindex(share.index)).mean()


def entropies(table: pd.DataFrame) -> pd.DataFrame:
    """Mean top-K entropy (nats) of student and teacher over valid tokens, by rollout."""
    valid = table[table["loss_mask_original"].fillna(1) > 0]
    return valid.groupby("rollout_id")[["Hs_topk", "Ht_topk"]].mean()


def check_run(run: Run, bank: BankSample | None) -> list[Check]:
    """All checks that the run's files allow."""
    checks: list[Check] = []

    def add(name: str, start: float, end: float, bad: bool, text: str) -> None:
        if np.isfinite(start) and np.isfinite(end):
            checks.append(Check(run.name, run.key, name, start, end, bool(bad), text))

    a, b = ends(run.column("rollout/response_length"))
    add("response length", a, b, b < 0.5 * a or b > 2 * a, f"{a:.1f} to {b:.1f} tokens")
    a, b = ends(run.column("rollout/truncated"))
    add("truncated responses", a, b, b > 0.1 and b > a + 0.05, f"{100 * a:.1f} % to {100 * b:.1f} %")
    a, b = ends(run.column("rollout/reverse_kl_valid"))
    add("reverse KL, all valid tokens", a, b, b > 1.1 * a + 0.02, f"{a:.3f} to {b:.3f} nats")
    before, after = eval_at(run, "before"), eval_at(run, "after")
    if before and after:
        a, b = before["accuracy"], after["accuracy"]
        add("held-out accuracy", a, b, b < a - 0.02, f"{100 * a:.1f} % to {100 * b:.1f} %")
    if bank is not None:
        h = entropies(bank.table)
        if len(h) and h["Hs_topk"].notna().any():
            a, b = ends(h["Hs_topk"].to_numpy())
            teacher = ends(h["Ht_topk"].to_numpy())[1]
            lost = b < 0.25 * a and b < 0.5 * teacher
            add("student entropy", a, b, lost or b > 2 * a, f"{a:.3f} to {b:.3f} nats (teacher {teacher:.3f} at the end)")
        a, b = ends(repetition(bank.table).to_numpy())
        add(f"repeated {NGRAM}-grams", a, b, b > 0.1 and b > 2 * a, f"{100 * a:.1f} % to {100 * b:.1f} %")
    return checks


def warnings(checks: list[Check]) -> list[str]:
    """One sentence for each sign of collapse."""
    return [f"{c.arm.label} ({c.run}): {c.name} went from {c.text}." for c in checks if c.bad]


def curves(arms, samples, styles) -> Picture | None:
    """Response length, truncated share, student entropy and repetition over training."""
    if not samples and not any(len(run.metrics) for runs in arms.values() for run in runs):
        return None
    panels = [("response length, tokens", "rollout/response_length"), ("truncated responses", "rollout/truncated")]
    with drawing() as plt:
        figure, axes = plt.subplots(1, 4, figsize=(10.6, 2.9))
        for ax, (title, column) in zip(axes, panels, strict=False):
            for key, runs in arms.items():
                for run in runs:
                    y = run.column(column)
                    if np.isfinite(y).any():
                        ax.plot(run.metrics["rollout_id"], smooth(y, min(9, max(1, len(y) // 3))), **(styles[key].line() | {"marker": None}))
            ax.set_title(title, fontsize=9.3)
        for key, sample in samples.items():
            h = entropies(sample.table)
            again = repetition(sample.table)
            style = styles[key].line() | {"markersize": 3.5}
            axes[2].plot(h.index, h["Hs_topk"], **style)
            axes[3].plot(again.index, again.to_numpy(), **style)
        if samples:
            h = entropies(next(iter(samples.values())).table)
            axes[2].plot(h.index, h["Ht_topk"], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="teacher")
        axes[2].set_title("mean entropy (top-K), nats", fontsize=9.3)
        axes[3].set_title(f"repeated {NGRAM}-grams", fontsize=9.3)
        for ax in axes:
            rollout_axis(ax)
            ax.set_ylim(0, max(ax.get_ylim()[1] * 1.05, 0.01))
        legend_below(figure, axes[2], columns=5)
        return picture(figure, "health", "Signs of collapse",
                       "Moving means at the left; sampled rollouts of the token bank at the right. A student that only learns to be short, "
                       "certain or repetitive can still show a small divergence." + many(styles), "Four line plots over training, one line a method.")  # fmt: skip
