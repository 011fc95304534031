"""How the report's pictures look: one colour and marker an arm everywhere, Okabe-Ito colours, quiet axes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ta_opd.report.loading import ArmKey

INK, SOFT, GRID, FAINT = "#1b1f24", "#57606a", "#d8dee4", "#b4bdc6"
MOST = 8  # arms that one picture tells apart by colour
# Told apart with every common colour blindness; markers and line styles say the same again.
_FIXED = {
    "full": ("#1b1f24", "o"), "dlearn_high": ("#d55e00", "s"), "entropy": ("#0072b2", "^"), "random": ("#8c959f", "X"),
    "ca_softor": ("#009e73", "D"), "tip": ("#cc79a7", "v"), "divergence": ("#b58900", "P"),
}  # fmt: skip
_SPARE = (("#56b4e9", "<"), ("#6f4e9c", ">"), ("#7a5c00", "p"), ("#00796b", "h"), ("#a83268", "d"), ("#4d4d4d", "*"))
_DASHES = ("-", (0, (5, 2)), (0, (2, 1.4)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class ArmStyle:
    """Look of one arm. dash tells budgets of one mask apart; faint: one of many, grey and without a place in legends."""

    label: str
    color: str
    marker: str
    dash: object
    faint: bool = False

    def line(self, number: int = 0) -> dict:
        """Keywords of matplotlib's plot for run `number` of the arm: the first run stands in the legend; faint lines lie below the others."""
        label = None if self.faint or number else self.label
        look = {"color": self.color, "linestyle": self.dash, "marker": self.marker, "label": label, "zorder": 2 if self.faint else 3}
        return look | ({"linewidth": 0.9} if self.faint else {})


def arm_styles(keys: Sequence[ArmKey], bold: Sequence[ArmKey] | None = None) -> dict[ArmKey, ArmStyle]:
    """A style for each arm: the mask decides hue and marker, further budgets of it are lighter and dashed. Arms outside `bold` are faint."""
    spare, by_mask, seen, styles = list(_SPARE), dict(_FIXED), {}, {}
    for key in keys:
        if bold is not None and key not in bold:
            styles[key] = ArmStyle(key.label, FAINT, "None", "-", True)
            continue
        if key.mask not in by_mask:
            by_mask[key.mask] = spare[len(by_mask) % len(spare)]
        color, marker = by_mask[key.mask]
        number = seen[key.mask] = seen.get(key.mask, -1) + 1
        styles[key] = ArmStyle(key.label, _lighter(color, number), marker, _DASHES[number % len(_DASHES)])
    return styles


def _lighter(color: str, steps: int) -> str:
    share = (0.0, 0.35, 0.55, 0.7)[min(steps, 3)]
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in parts)


@contextmanager
def drawing():
    """matplotlib's pyplot with the report's settings, which end with the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9.5, "axes.edgecolor": SOFT, "axes.labelcolor": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": GRID, "grid.linewidth": 0.7, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.7, "figure.constrained_layout.use": True,
        "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "ta-opd", "savefig.facecolor": "white",
    }  # fmt: skip
    with plt.rc_context(settings):
        yield plt


@dataclass(frozen=True)
class Picture:
    """A finished figure: an id for the page, the title and caption a reader needs, alternative text, and both renderings."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.png"
        path.write_bytes(self.png)
        return path


def picture(figure, name: str, title: str, caption: str, alt: str) -> Picture:
    """Renders and closes a matplotlib figure. The SVG is made fit to stand inside a page: no XML header, ids of its own."""
    from matplotlib import pyplot as plt

    png, svg = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a token of any script: shows as a box
        figure.savefig(png, format="png", dpi=144)
        figure.savefig(svg, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", text)  # inside HTML the parser knows the namespaces
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#([^")]+)', rf"\1#{name}-\2", text)
    text = re.sub(r"<svg [^>]*?>", lambda m: _responsive(m.group(0), alt), text, count=1)
    return Picture(name, title, caption, alt, text, png.getvalue())


def _responsive(tag: str, alt: str) -> str:
    """The opening tag without a fixed size, with a label for screen readers."""
    from html import escape

    tag = re.sub(r' (?:width|height)="[^"]*"', "", tag)
    return tag[:-1] + f' role="img" aria-label="{escape(alt, quote=True)}">'


def legend_below(figure, axes, *, columns: int = 4) -> None:
    """One legend for all panels under them, where it hides no line however many arms there are."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


def rollout_axis(ax, label: str = "rollout") -> None:
    """A horizontal axis of rollouts: whole numbers only, also where there are two of them."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))


def many(styles: dict) -> str:
    """What a caption adds where not every arm has a colour of its own."""
    faint = sum(s.faint for s in styles.values())
    told = "the best ones, full OPD, TA-OPD and random where they were run"
    return f" Coloured: {told}; grey: the other {faint} of {len(styles)} methods." if faint else ""


def sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def percent(value: float, digits: int = 0) -> str:
    return "–" if value != value else f"{100 * value:.{digits}f} %"


def smooth(values, window: int):
    """Centred moving mean that ignores NaN and shrinks at both ends."""
    import numpy as np

    values = np.asarray(values, float)
    known = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)
