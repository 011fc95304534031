"""What a suite reports, from files as train.py and the tools write them."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ta_opd.suite import memory as mem
from ta_opd.suite import methods, page, plan, summary


@pytest.fixture
def finished(tmp_path):
    """Two methods, two budgets of one, two seeds; one run failed."""
    settings = plan.Settings(
        root=tmp_path, python="python", output_root=tmp_path / "out", log_dir=tmp_path / "logs", tag="t",
        entries=tuple(methods.parse_entries("pure_opd:1.0 teachability:0.10 teachability:0.05")),
        seeds=tuple(methods.parse_seeds("seed1 seed2")), student="/m/s", teacher="/m/t", prompt_data="/d/p.jsonl", top_k=16,
        max_response_len=64,
    )  # fmt: skip
    rows = plan.make_rows(settings, {})
    memory = mem.Memory(settings.directory / "suite_state.json")
    for number, row in enumerate(rows):
        if number == 5:
            memory.set(row.name, "train", status=mem.FAILED, seconds=3.0)
            continue
        write_run(row, accuracy=0.4 + 0.1 * (row.seeds.label == "seed2"), keep=row.entry.ratio, shift=0.01 * number)
        for step in plan.step_names(settings):
            memory.set(row.name, step, status=mem.DONE, seconds=5.0)
    return settings, rows, memory


def write_run(row, accuracy, keep, shift):
    row.run_dir.mkdir(parents=True)
    (row.run_dir / "DONE").write_text(json.dumps({"num_rollout": 20, "seconds": 12.5}))
    lines = [
        {"rollout_id": i, "rollout/kept_tokens": 1000 * keep, "rollout/valid_tokens": 1000, "rollout/reverse_kl_valid": 1.0 - i / 40,
         "rollout/response_length": 30} for i in range(20)
    ]  # fmt: skip
    resumed = [{**lines[7], "rollout/kept_tokens": 999999.0}, *lines]  # a rollout logged before an interruption, then again
    text = "".join(json.dumps(line) + "\n" for line in resumed) + '{"rollout_id": 20, "rollout/kept'
    (row.run_dir / "metrics.jsonl").write_text(text)
    evaluations = [{"rollout_id": r, "dataset": d, "accuracy": a} for d in "ab" for r, a in ((-1, 0.2), (9, 0.3), (19, accuracy))]
    (row.run_dir / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    row.eval_dir.mkdir(parents=True)
    base = np.array([1.0, 2.0, np.nan])
    pd.DataFrame({"KLf_full_base": base, "KLf_full": [0.5 + shift, 1.5 + shift, 9.0]}).to_parquet(row.eval_dir / "fixed_context_metrics.parquet")
    (row.eval_dir / "gain").mkdir()
    (row.eval_dir / "gain/q3_bootstrap_matching_summary.csv").write_text(
        "bootstrap_mean_diff,bootstrap_ci_low,bootstrap_ci_high\n0.05,0.01,0.09\n"
    )


def test_one_row_a_run(finished):
    table = summary.summarize(*finished)
    assert list(table.columns) == list(summary.COLUMNS) and len(table) == 6
    first = table.iloc[1]
    assert (first["method"], first["mask"], first["budget_asked"], first["seed_label"]) == ("teachability", "dlearn_high", 0.1, "seed1")
    assert first["rollouts"] == 20 and first["budget_real"] == pytest.approx(0.1)
    assert first["kept_tokens"] == 2000 and first["valid_tokens"] == 20000
    assert first["reverse_kl_first"] == pytest.approx(1 - 2 / 40) and first["reverse_kl_last"] == pytest.approx(1 - 17 / 40)
    assert first["accuracy_before"] == pytest.approx(0.2) and first["accuracy_after"] == pytest.approx(0.4)
    assert first["forward_kl_before"] == pytest.approx(1.5) and first["gain"] == pytest.approx(0.49)
    assert first["gain_relative"] == pytest.approx(0.49 / 1.5)
    assert (first["q3_gap"], first["q3_gap_low"], first["q3_gap_high"]) == (0.05, 0.01, 0.09)
    assert first["train_seconds"] == 12.5 and first["seconds"] == 20.0


def test_a_failed_run_has_a_row_without_numbers(finished):
    failed = summary.summarize(*finished).iloc[5]
    assert failed["status"] == mem.FAILED and math.isnan(failed["gain"]) and math.isnan(failed["accuracy_after"])


def test_intervals_over_seeds(finished):
    seeds = summary.over_seeds(summary.summarize(*finished)).set_index(["method", "budget_asked"])
    full = seeds.loc[("pure_opd", 1.0)]
    assert full["accuracy_after"] == pytest.approx(0.45)
    assert full["accuracy_after_sem"] == pytest.approx(0.05)  # two values 0.1 apart: sd 0.0707, over the root of 2
    assert full["accuracy_after_high"] - full["accuracy_after"] == pytest.approx(12.706 * 0.05, rel=1e-3)
    single = seeds.loc[("teachability", 0.05)]  # its second seed failed
    assert single["runs"] == 1 and single["accuracy_after"] == pytest.approx(0.4) and math.isnan(single["accuracy_after_low"])


def test_files(finished):
    settings = finished[0]
    written = summary.write(*finished)
    names = {p.relative_to(settings.directory).as_posix() for p in written}
    assert names == {
        "suite_summary.csv", "suite_summary_seeds.csv", "suite_summary.md", "suite_summary.html", "plots/accuracy_after_by_budget.png",
        "plots/gain_by_budget.png", "plots/reverse_kl_last_by_budget.png",
    }  # fmt: skip
    assert len(pd.read_csv(settings.directory / "suite_summary.csv")) == 6
    text = (settings.directory / "suite_summary.md").read_text()
    assert "| teachability | dlearn_high | 0.1 | 0.1 | seed1 | done |" in text and "failed" in text
    html = (settings.directory / "suite_summary.html").read_text()
    assert html.count("data:image/png;base64,") == 3 and "http" not in html.split("<body>")[1].split("base64")[0]
    assert "<td class=failed>failed</td>" in html
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_nothing_finished_yet(tmp_path, finished):
    settings, rows, _ = finished
    empty = mem.Memory(Path(tmp_path) / "none.json")
    other = [plan.Row(r.name, r.entry, r.seeds, tmp_path / "x" / r.name, tmp_path / "y" / r.name, {}) for r in rows]
    table = summary.summarize(settings, other, empty)
    assert set(table["status"]) == {mem.PENDING}
    assert page.plots(summary.over_seeds(table), tmp_path / "plots") == []
    assert "pending" in page.markdown(settings, table, summary.over_seeds(table))


def test_text_in_the_page_is_escaped(finished):
    settings, rows, memory = finished
    table = summary.summarize(settings, rows, memory)
    table["method"] = "<script>"
    assert "<script>" not in page.html(settings, table, summary.over_seeds(table), [])


def test_methods_at_one_budget_are_rows_and_budgets_are_lines(finished, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page.pictures, "curves", lambda frame, x, y, by, path, **_: drawn.append(("lines", y)) or path)
    monkeypatch.setattr(page.pictures, "dots", lambda frame, x, by, path, **options: drawn.append(("rows", x, options["reference"])) or path)
    seeds = summary.over_seeds(summary.summarize(*finished))
    page.plots(seeds, tmp_path)
    assert [kind for kind, *_ in drawn] == ["lines"] * 3  # teachability was run at two budgets
    drawn.clear()
    page.plots(seeds.drop_duplicates("method"), tmp_path)
    assert [kind for kind, *_ in drawn] == ["rows"] * 3 and drawn[0][2] == pytest.approx(0.45)  # the mean accuracy of full OPD
