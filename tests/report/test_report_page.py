"""The page as a file: complete, self-contained, well-formed, safe to open, within its size."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_suite

from ta_opd.errors import ConfigError, DataError
from ta_opd.report import page, style
from ta_opd.report.build import Options, build_report
from ta_opd.report.loading import ArmKey

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "img", "input", "link", "hr", "path", "use", "image"}


class Outline(HTMLParser):
    """Collects ids and attributes and checks that tags close in order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.stack, self.ids, self.attributes, self.errors, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k, v) for k, v in attrs]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.stack or self.stack.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def outline(report):
    parser = Outline()
    parser.feed(report.html.read_text())
    parser.close()
    return parser


def test_tags_close_and_ids_are_unique(outline):
    assert outline.errors == [] and outline.stack == []
    assert len(outline.ids) == len(set(outline.ids))


def test_every_section_and_link_target_is_there(outline):
    assert {name for name, _ in page.SECTIONS} <= set(outline.ids)
    targets = {v[1:] for tag, k, v in outline.attributes if k in ("href", "xlink:href") and v.startswith("#")}
    assert targets and targets <= set(outline.ids)
    figures = {i.removeprefix("figure-") for i in outline.ids if i.startswith("figure-")}
    assert figures == {"glance", "reverse_kl", "kept_tokens", "health", "response", "plane", "token_kinds", "positions", "quadrant_gain", "seconds"}


def test_nothing_is_loaded_from_anywhere(report, outline):
    text = report.html.read_text()
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\((?!#|\"?data:)", text)
    for tag, key, value in outline.attributes:
        if key in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert value.startswith(("#", "data:")), (tag, key, value)
    assert "default-src 'none'" in text


def test_texts_of_the_data_cannot_become_markup(report, outline):
    text = report.html.read_text()
    assert "A <suite> & more" in "".join(outline.text)  # the title, as text
    data = re.search(r'<script type="application/json" id="heat-data">(.*?)</script>', text, re.DOTALL).group(1)
    assert "<" not in data and "&" not in data
    assert "</script>" in json.loads(data)["pieces"]  # a token of that very text is in the data


def test_first_glance_names_the_best_method_with_its_interval(report, outline):
    assert report.headline[0].startswith("Full OPD reached the best held-out accuracy: ")
    assert re.search(r"\[\d+\.\d, \d+\.\d\]", report.headline[0])
    assert any("Clearly behind: " in s and "Random 20 %" in s for s in report.headline)
    assert any("not of the seed" in s for s in report.headline)
    body = " ".join("".join(outline.text).split())
    for sentence in report.headline:
        assert sentence in body


def test_pictures_and_tables_lie_beside_the_page(report):
    beside = report.html.with_suffix("")
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in report.pictures) and len(report.pictures) == 10
    table = pd.read_csv(beside / "summary.csv")
    assert table["mask"].tolist() == ["full", "dlearn_high", "random"]
    assert (table["accuracy_after_low"] <= table["accuracy_after"]).all() and (table["accuracy_after"] <= table["accuracy_after_high"]).all()
    assert table.loc[1, "budget_real"] == pytest.approx(0.2, abs=0.02)
    assert (beside / "summary.md").read_text().startswith("| method | mask |")
    assert not list(report.html.parent.glob("*.partial"))


def test_size_stays_under_its_bound(report, suite_dir, tmp_path):
    assert report.html.stat().st_size < 2 << 20
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        Options(max_bytes=1000)


def test_300_long_contexts_stay_within_the_size_asked_for(tmp_path):
    methods = (("full", 1.0, 0.8), ("dlearn_high", 0.1, 0.7))
    home = report_suite.write_suite(tmp_path / "s", methods, rollouts=2, samples=2, contexts=300, length=192)
    made = build_report(home, options=Options(max_bytes=5 << 20, pictures=False, draws=200))
    assert made.html.stat().st_size < 5 << 20
    data = json.loads(re.search(r'id="heat-data">(.*?)</script>', made.html.read_text(), re.DOTALL).group(1))
    frozen = [b for b in data["blocks"] if b["kind"] == "frozen"]
    assert len(frozen) == 2 and 100 <= len(frozen[0]["responses"]) < 300 and "does not fit" in frozen[0]["caption"]


def test_a_run_with_nothing_but_metrics_still_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"rollout_id": 0, "rollout/reverse_kl_valid": 0.5, "rollout/valid_tokens": 10}\n{"rollout_id": 1}\n')
    made = build_report(run)
    text = made.html.read_text()
    assert "shows training only" in text and "No token bank was written" in text and 'id="heat-data"' not in text
    parser = Outline()
    parser.feed(text)
    assert parser.errors == []


def test_budgets_of_one_mask_get_a_curve_and_seeds_an_interval(tmp_path):
    methods = (("full", 1.0, 0.8), ("entropy", 0.05, 0.5), ("entropy", 0.2, 0.7))
    home = report_suite.write_suite(tmp_path / "s", methods, seeds=(1, 2), rollouts=3, samples=4, contexts=8)
    made = build_report(home, options=Options(draws=200))
    assert "budget_curve.png" in {p.name for p in made.pictures}
    assert made.summary["seeds"].tolist() == [2, 2, 2]
    assert not any("not of the seed" in s for s in made.headline)


def test_selector_gains_of_the_diagnostic_are_drawn_when_there(suite_dir, tmp_path):
    home = tmp_path / "s"
    shutil.copytree(suite_dir, home)
    rows = [{"selector": s, "ratio": r, "mean_gain": g, "ci_low": g - 0.1, "ci_high": g + 0.1} for s, g in (("entropy", 0.3), ("random", 0.1)) for r in (0.05, 0.1)]
    (home / "topn").mkdir()
    pd.DataFrame(rows).to_csv(home / "topn" / "matched_fixed_context_topn.csv", index=False)
    made = build_report(home, options=Options(draws=100))
    assert "selector_gain.png" in {p.name for p in made.pictures}


def test_a_diagnostic_folder_shows_its_checkpoints_and_advice(suite_dir, tmp_path):
    home = tmp_path / "diag"
    for name, run in (("eval_iter_0000010", "random_0.2_seed1"), ("eval_iter_0000009", "dlearn_high_0.2_seed1"), ("eval_latest", "full_1_seed1")):
        (home / name).mkdir(parents=True)
        shutil.copy(suite_dir / "runs" / run / "fixed_context_metrics.parquet", home / name)
    shutil.copy(suite_dir / "context_bank.parquet", home)
    (home / "analysis").mkdir()
    (home / "analysis" / "selector_recommendation.json").write_text(json.dumps({"warnings": ["entropy loses to random"]}))
    made = build_report(home, options=Options(draws=100))
    assert made.summary["method"].tolist() == ["Checkpoint iter 0000009", "Checkpoint iter 0000010", "Checkpoint latest"]
    assert made.headline[0].startswith("Checkpoint latest reached the best KL on the frozen contexts")
    assert made.warnings == ["Selector recommendation: entropy loses to random"]
    assert {"glance.png", "quadrant_gain.png"} <= {p.name for p in made.pictures}
    data = json.loads(re.search(r'id="heat-data">(.*?)</script>', made.html.read_text(), re.DOTALL).group(1))
    assert [b["kind"] for b in data["blocks"]] == ["frozen"] * 3 and data["blocks"][0]["responses"][0]["prompt"] == "Q0+1?"

    # with the training run behind it: its curves and token bank, and still judged by what all checkpoints have
    trained = build_report(home, options=Options(draws=100, training=str(suite_dir / "runs" / "full_1_seed1")))
    assert {"reverse_kl.png", "kept_tokens.png", "plane.png", "health.png"} <= {p.name for p in trained.pictures} - {p.name for p in made.pictures}
    assert trained.headline == made.headline and trained.summary["accuracy_after"].notna().tolist() == [False, False, True]
    absent = build_report(home, options=Options(draws=100, training=str(tmp_path), pictures=False))
    assert any("no metrics.jsonl, so there are no curves over training" in note for note in absent.notes)


def test_collapse_is_shown_on_the_page(suite_dir, tmp_path):
    home = tmp_path / "s"
    shutil.copytree(suite_dir, home)
    path = home / "runs" / "random_0.2_seed1" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["rollout/response_length"] = 1.0
    path.write_text("\n".join(json.dumps(r) for r in rows))
    made = build_report(home, options=Options(draws=100, pictures=False))
    assert len(made.warnings) == 1 and "<h3>Warnings</h3>" in made.html.read_text()
    assert made.pictures == []


def test_tool_prints_the_result_and_where_the_page_is(suite_dir, tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "build_report.py"))["main"]
    assert tool([str(suite_dir), "--output", str(tmp_path / "r.html"), "--draws", "100", "--title", "Mine"]) == 0
    out = capsys.readouterr().out
    assert "reached the best" in out and f"report: {tmp_path / 'r.html'}" in out
    assert "<h1>Mine</h1>" in (tmp_path / "r.html").read_text()
    assert tool([str(tmp_path)]) == 2
    assert "no run with a metrics.jsonl" in capsys.readouterr().err


def test_missing_directory_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(DataError):
        build_report(tmp_path / "nowhere", tmp_path / "out" / "r.html")
    assert not (tmp_path / "out").exists()


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_arms_have_looks_of_their_own_and_text_has_contrast():
    keys = [ArmKey(m, r) for m in ("full", "dlearn_high", "entropy", "random", "ca_softor", "tip", "divergence", "mine", "other") for r in (0.1, 0.2)]
    looks = style.arm_styles(keys)
    assert len({(s.color, s.marker, str(s.dash)) for s in looks.values()}) == len(keys)
    assert len({s.marker for s in looks.values()}) == 9
    css = (page.ASSETS / "report.css").read_text()
    for name in ("ink", "soft", "accent", "warn"):
        color = re.search(rf"--{name}: (#\w+)", css).group(1)
        assert 1.05 / (luminance(color) + 0.05) >= 4.5, name
    assert 1.05 / (luminance(style.SOFT) + 0.05) >= 4.5


def test_a_dark_page_is_readable_too_and_leaves_colour_scales_as_they_are():
    dark = (page.ASSETS / "report.css").read_text().split("prefers-color-scheme: dark")[1]
    paper, wash = (luminance(re.search(rf"--{name}: (#\w+)", dark).group(1)) for name in ("paper", "wash"))
    for name in ("ink", "soft", "accent", "warn"):
        own = luminance(re.search(rf"--{name}: (#\w+)", dark).group(1))
        assert (own + 0.05) / (max(paper, wash) + 0.05) >= 4.5, name
    assert round(255 * 0.1) == int(re.search(r"--paper: #(\w\w)", dark).group(1), 16)  # what invert(.9) makes of a picture's white
    assert "#figure-plane svg, #figure-response svg { filter: none" in dark


def test_palettes_are_the_colour_blind_safe_ones():
    scales = page.palettes()
    assert set(scales) == {"cividis", "viridis", "signed"}
    for name in ("cividis", "viridis"):
        light = [luminance("#" + "".join(f"{c:02x}" for c in stop)) for stop in scales[name]]
        assert all(a < b for a, b in zip(light, light[1:], strict=False))  # readable without any hue
