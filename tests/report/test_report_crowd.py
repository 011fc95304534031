"""A suite of more methods than one picture can tell apart: what is told apart, what becomes grey, and that nothing overlaps."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest
import report_suite

from ta_opd.report import figures_outcome, style
from ta_opd.report.build import Options, build_report
from ta_opd.report.loading import load
from ta_opd.report.statistics import Resampler, outcome
from ta_opd.report.summary import NAMED
from ta_opd.selection import list_selectors


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A suite of ten methods, more than a legend holds, and everything that was drawn of it, with its warnings."""
    masks = [s.name for s in list_selectors() if s.name not in ("none", "random", "dlearn_high")][:7]
    methods = [("full", 1.0, 0.8), ("dlearn_high", 0.2, 0.3), ("random", 0.2, 0.05), *((m, 0.2, 0.1 + 0.05 * i) for i, m in enumerate(masks))]
    home = report_suite.write_suite(tmp_path_factory.mktemp("crowd"), methods, rollouts=2, samples=4, contexts=4, prompts=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = build_report(home, options=Options(draws=200))
    return report, [str(w.message) for w in caught]


def test_many_methods_stay_readable(crowd):
    report, caught = crowd
    assert not [text for text in caught if "layout" in text]  # a legend that takes all the room
    page_text = report.html.read_text()
    assert "grey: the other 2 of 10 methods" in page_text
    assert "2 further methods are not shown" in page_text  # of the quadrants
    assert max(sentence.count(";") for sentence in report.headline) <= NAMED
    assert any("The best of 10 methods is in part the luckiest" in s for s in report.headline)


def test_the_methods_with_a_colour_are_the_best_and_those_to_compare_with(crowd):
    report, _ = crowd
    suite = load(report.html.parent)
    outcomes = {key: outcome(runs, Resampler(50)) for key, runs in suite.arms.items()}
    bold = figures_outcome.bold_arms(outcomes)
    assert len(bold) == style.MOST and {"full", "dlearn_high", "random"} <= {k.mask for k in bold}
    rest = [k for k in figures_outcome.best_first(outcomes) if k not in bold]
    best = [k for k in bold if k.mask not in ("full", "dlearn_high", "random")]
    assert min(outcomes[k].accuracy_after.value for k in best) >= max(outcomes[k].accuracy_after.value for k in rest)
    looks = style.arm_styles(list(suite.arms), bold)
    assert {k for k, s in looks.items() if s.faint} == set(rest)
    assert len({(looks[k].color, looks[k].marker) for k in bold}) == len(bold)
    assert looks[rest[0]].line()["label"] is None and looks[bold[0]].line()["label"] == bold[0].label and looks[bold[0]].line(1)["label"] is None


def test_one_method_is_not_called_the_best_and_a_bank_without_positions_has_no_picture_of_them(tmp_path):
    home = report_suite.write_suite(tmp_path, [("dlearn_high", 0.2, 0.3)], rollouts=2, samples=4, contexts=4, prompts=10)
    for file in (home / "runs" / "dlearn_high_0.2_seed1" / "token_bank").glob("*.parquet"):
        pd.read_parquet(file).drop(columns="pos_norm").to_parquet(file)
    report = build_report(home, options=Options(draws=50))
    assert report.headline[0].startswith("Teachability (TA-OPD) 20 %: held-out accuracy ") and "before training" in report.headline[0]
    assert "positions.png" not in {p.name for p in report.pictures}
