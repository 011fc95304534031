"""The pictures of the analyses: nothing is cut off, lines that lie on one another are seen, and every selector finds room."""

import numpy as np
import pandas as pd
import pytest

from ta_opd.fixed_context import plots
from ta_opd.fixed_context.recommend import RecommendConfig, as_markdown, recommend
from ta_opd.selection import list_selectors
from tests.fixed_context.diagnostic_cases import paper_table


@pytest.fixture
def figures(monkeypatch):
    """Figures in the order in which they were saved."""
    kept = []
    saved = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (kept.append(figure), saved(figure, path))[1])
    return kept


def is_inside(figure) -> bool:
    """Whether everything that is drawn lies on the canvas (inches, with a hundredth for rounding)."""
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01


def lines(names, low=-0.2, x=(0.05, 0.1, 0.5)) -> pd.DataFrame:
    rows = [(name, v, 0.3 * v, 0.3 * v + low, 0.3 * v + 0.1) for name in names for v in x]
    return pd.DataFrame(rows, columns=["rule", "ratio", "gain", "low", "high"])


def test_equal_lines_stand_beside_one_another_and_twenty_look_different(tmp_path, figures):
    frame = lines([f"a rule with quite a long name {i}" for i in range(20)])
    plots.curves(frame, "ratio", "gain", "rule", tmp_path / "a.png", low="low", high="high", title="A title of some length by budget", note="what whiskers are")
    (axes,) = figures[0].axes
    drawn = [line for line in axes.get_lines() if line.get_label() in set(frame["rule"])]
    assert len(drawn) == 20 and len({line.get_xdata()[0] for line in drawn}) == 20
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}) == 20
    assert [t.get_text() for t in axes.get_xticklabels()] == ["5 %", "10 %", "50 %"]
    reach = max(line.get_xdata().max() for line in drawn)
    assert reach < 2.5  # no line reaches into the next budget's place
    assert is_inside(figures[0])


def test_whole_numbers_and_names_on_the_axis(tmp_path, figures):
    plots.curves(lines(["one"], x=(1, 2, 3, 4)), "ratio", "gain", "rule", tmp_path / "a.png")
    plots.curves(lines(["one"], x=(1, 2)), "ratio", "gain", "rule", tmp_path / "b.png", places=["main", "gsm8k"])
    ticks = [[t.get_text() for t in figure.axes[0].get_xticklabels()] for figure in figures]
    assert ticks == [["1", "2", "3", "4"], ["main", "gsm8k"]]


def test_rows_are_sorted_with_their_whiskers_and_the_reference(tmp_path, figures):
    frame = pd.DataFrame({"rule": [f"a rule with quite a long name {i}" for i in range(37)], "gain": np.linspace(0, 1, 37) ** 2})
    frame = frame.assign(low=frame["gain"] - 0.1, high=frame["gain"] + 0.1).sample(frac=1, random_state=0)
    plots.dots(frame, "gain", "rule", tmp_path / "a.png", low="low", high="high", title="A title", note="a note", reference=0.98, reference_name="full OPD")
    (axes,) = figures[0].axes
    assert axes.get_yticklabels()[-1].get_text() == "a rule with quite a long name 36" and len(axes.get_yticklabels()) == 37
    assert is_inside(figures[0])


def test_gain_pictures_fit(tmp_path, figures):
    rng = np.random.default_rng(0)
    columns = {f"feature_{n}": rng.random(500) for n in "HDC"} | {"feature_G": rng.normal(size=500), "residual_HD": rng.normal(size=500)}
    made = plots.gain_pictures(pd.DataFrame(columns | {"in_q3": rng.random(500) < 0.2}), tmp_path)
    assert len(made) == len(figures) == 3 and all(is_inside(f) for f in figures)


@pytest.mark.parametrize("ratios", [(0.1,), (0.05, 0.1, 0.2, 0.3, 0.5)])
def test_every_selector_and_budget_has_a_cell(tmp_path, figures, ratios):
    names = [s.name for s in list_selectors()]
    verdicts = ["better than random", "worse than random", "same as random"]
    rows = [{"selector": n, "ratio": r, "gain_per_kept_token": 0.1 * i, "vs_random": 0.1 - 0.1 * (i % 3), "verdict": verdicts[i % 3],
             "keep_ratio": 0.5 * r if n == names[0] else r} for i, n in enumerate(names) for r in ratios]  # fmt: skip
    plots.selector_table(pd.DataFrame(rows), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert len(axes.texts) == len(axes.patches) == len(names) * len(ratios)
    assert sum(t.get_text().endswith("*") for t in axes.texts) == len(ratios)
    assert sum(p.get_alpha() == 0 for p in axes.patches) == sum(r["verdict"] == "same as random" for r in rows)
    assert is_inside(figures[0])


def test_the_terminal_gets_the_best_of_each_selector_and_the_references():
    own = ("dlearn_high", "entropy", "divergence", "random")
    result = recommend(paper_table(), RecommendConfig(ratios=(0.1, 0.2, 0.3), selectors=own, bootstrap=20, source="full"))
    table = [row for row in as_markdown(result, most=2).splitlines() if row.startswith("| ")][2:]
    assert len(table) == 4 and "random" in table[2] + table[3] and "full" in table[2] + table[3]
    assert len([row for row in as_markdown(result).splitlines() if row.startswith("| ")][2:]) == len(result.table)
    assert set(result.table[result.table["selector"] == "random"]["verdict"]) == {"one draw of it"}
