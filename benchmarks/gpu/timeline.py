"""The phases of a run as a picture: one row a phase, waiting in grey, and what the GPUs did below."""

from __future__ import annotations

import json
from pathlib import Path

ORDER = ("sample", "score", "select", "split", "train", "sync", "save", "eval", "waiting")


def spans_of(trace: Path, rows: list[dict]) -> list[tuple[str, float, float]]:
    """(phase, begin, end) in seconds since the epoch. Generation is cut where the last token was sampled; `waiting` is what no phase covers.

    rows: the lines of metrics.jsonl, in order.
    """
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    out, generated = [], 0
    for e in sorted(events, key=lambda e: e["ts"]):
        begin, end = e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6
        if e["name"] != "generate":
            out.append((e["name"], begin, end))
            continue
        row = rows[generated] if generated < len(rows) else {}
        after = min(row.get("seconds/score") or 0.0, end - begin)
        out.append(("sample", begin, end - after))
        if after > 0:
            out.append(("score", end - after, end))
        generated += 1
    covered, gaps = None, []
    for _, begin, end in sorted(out, key=lambda s: s[1]):
        if covered is not None and begin - covered > 1e-3:
            gaps.append(("waiting", covered, begin))
        covered = end if covered is None else max(covered, end)
    return out + gaps


def draw(spans: list[tuple[str, float, float]], samples: list, path: Path, title: str) -> None:
    """samples: of watch.Watch; its utilisation is drawn where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start, stop = min(s[1] for s in spans), max(s[2] for s in spans)
    names = [n for n in ORDER if any(s[0] == n for s in spans)]
    inside = [s for s in samples if start <= s[0] <= stop and s[1]]
    heights = [0.5 + 0.38 * len(names)] + ([1.6] if inside else [])
    figure, axes = plt.subplots(len(heights), 1, figsize=(12, 1.1 + sum(heights)), sharex=True, squeeze=False, height_ratios=heights, layout="constrained")
    top = axes[0, 0]
    colours = dict(zip(ORDER, plt.get_cmap("tab10").colors, strict=False)) | {"waiting": "0.7"}
    for name, begin, end in spans:
        top.barh(names.index(name), max(end - begin, (stop - start) / 2000), left=begin - start, color=colours[name], height=0.75)
    for y, name in enumerate(names):
        total = sum(s[2] - s[1] for s in spans if s[0] == name)
        top.annotate(f"{total:.2f} s", (1.005, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    top.set_yticks(range(len(names)), names)
    top.invert_yaxis()
    top.set_title(title, loc="left", fontsize=10)
    top.grid(axis="x", color="0.9")
    top.set_axisbelow(True)
    if inside:
        for gpu in range(len(inside[0][1])):
            axes[1, 0].plot([s[0] - start for s in inside], [100 * s[1][gpu] for s in inside], label=f"GPU {gpu}", linewidth=1)
        axes[1, 0].set_ylim(0, 105)
        axes[1, 0].set_ylabel("% of time busy")
        axes[1, 0].legend(fontsize=8, loc="lower right")
    axes[-1, 0].set_xlabel("seconds")
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
