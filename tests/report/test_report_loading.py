"""Finding and reading runs: what is there, what is missing, what is broken."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import report_suite

from ta_opd.errors import DataError
from ta_opd.report import figures_tokens, heatmap, loading
from ta_opd.report.loading import ArmKey
from ta_opd.report.style import arm_styles


def test_suite_is_read_in_its_planned_order(suite_dir):
    suite = loading.load(suite_dir)
    assert suite.title == "A <suite> & more"
    assert [key for key in suite.arms] == [ArmKey("full", 1.0), ArmKey("dlearn_high", 0.2), ArmKey("random", 0.2)]
    run = suite.runs[1]
    assert len(run.metrics) == 6 and run.contexts is not None and run.done["seconds"] == 12.5
    assert loading.eval_at(run, "before")["rollout_id"] == -1 and loading.eval_at(run, "after")["rollout_id"] == 5
    assert suite.notes == [] and len(suite.bank_prompts) == 20


def test_one_run_directory_is_enough(suite_dir):
    suite = loading.load(suite_dir / "runs" / "random_0.2_seed1")
    assert [run.key for run in suite.runs] == [ArmKey("random", 0.2)]


def test_suite_summary_names_the_runs_and_their_score_directories(suite_dir, tmp_path):
    tag = tmp_path / "tag"
    run = tmp_path / "some_run"
    shutil.copytree(suite_dir / "runs" / "dlearn_high_0.2_seed1", run)
    scores = tag / "dlearn_high_r0p20_seed1"
    scores.mkdir(parents=True)
    (run / "fixed_context_metrics.parquet").rename(scores / "fixed_context_metrics.parquet")
    row = {"run_dir": "/elsewhere/some_run", "mask": "dlearn_high", "budget_asked": 0.2, "seed_label": "seed1"}
    pd.DataFrame([row]).to_csv(tag / "suite_summary.csv", index=False)
    suite = loading.load(tag)
    assert suite.runs[0].directory == run and suite.runs[0].contexts is not None


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_directory_without_runs_is_an_error(tmp_path, what):
    place = tmp_path / "x"
    if what == "empty":
        place.mkdir()
    elif what == "file":
        place.write_text("")
    with pytest.raises(DataError, match="expected"):
        loading.load(place)


def test_what_is_broken_becomes_a_note_and_a_half_line_is_skipped(suite_dir, tmp_path):
    home = tmp_path / "s"
    shutil.copytree(suite_dir, home)
    broken = home / "runs" / "random_0.2_seed1"
    whole = (broken / "fixed_context_metrics.parquet").read_bytes()
    (broken / "fixed_context_metrics.parquet").write_bytes(whole[: len(whole) // 2])
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"rollout_id": 6, "rollout/re')
    (broken / "token_bank" / "rollout_000002.parquet").write_bytes(b"PAR1 not really")
    (home / "runs" / "empty").mkdir()
    (home / "runs" / "empty" / "metrics.jsonl").write_text("")
    suite = loading.load(home)
    assert len(suite.runs) == 3 and len(suite.runs[2].metrics) == 6 and suite.runs[2].contexts is None
    sample = loading.sample_bank(suite.runs[2], max_rollouts=10, max_rows=10**6, notes=suite.notes)
    assert 2 not in sample.rollouts and len(sample.rollouts) == 5
    assert sum("cut off" in n or "not a readable" in n for n in suite.notes) == 2
    assert any(n.startswith("empty: no line") for n in suite.notes)


def test_a_resumed_rollout_counts_once(suite_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(suite_dir / "runs" / "full_1_seed1", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"rollout_id": 3, "rollout/reverse_kl_valid": 99.0}) + "\n")
    loaded = loading.read_run(run, None, [])
    assert list(loaded.metrics["rollout_id"]) == list(range(6))
    assert loaded.column("rollout/reverse_kl_valid")[3] == 99.0
    assert np.isnan(loaded.column("never logged")).all()


def test_bank_sample_keeps_both_ends_and_its_limits(suite_dir):
    run = loading.load(suite_dir).runs[0]
    sample = loading.sample_bank(run, max_rollouts=3, max_rows=10**6, notes=[])
    assert sample.rollouts == (0, 2, 5) and sample.of == 6 and "3 of 6 rollouts" in sample.caption
    few = loading.sample_bank(run, max_rollouts=6, max_rows=200, notes=[])
    assert {0, 5} <= set(few.rollouts) and len(few.table) <= 200
    assert list(sample.table["tok_pos"][:3]) == [0, 1, 2]
    assert loading.sample_bank(loading.Run("x", run.directory, run.key, "", {}, run.metrics, [], {}, None, None), max_rollouts=1, max_rows=1, notes=[]) is None


def test_labels_and_slugs_tell_budgets_apart():
    keys = [ArmKey("dlearn_high", r) for r in (0.05, 0.005, 0.1)] + [ArmKey("full", 1.0), ArmKey("my_rule", 0.5)]
    assert [k.label for k in keys] == ["Teachability (TA-OPD) 5 %", "Teachability (TA-OPD) 0.5 %", "Teachability (TA-OPD) 10 %", "Full OPD", "my_rule 50 %"]
    assert len({k.slug for k in keys}) == 5


def test_aliases_and_ratio_one_are_full_or_canonical(tmp_path):
    for mask, ratio, key in (("none", 0.1, ArmKey("full", 1.0)), ("entropy", 1.0, ArmKey("full", 1.0)), ("teachability", 0.2, ArmKey("dlearn_high", 0.2))):
        report_suite.write_run(tmp_path / f"{mask}{ratio}", mask, ratio, 0.5, 1, 2, 3, 4, 5, False, 8)
        assert loading.read_run(tmp_path / f"{mask}{ratio}", None, []).key == key


def test_lists_of_frozen_contexts_are_read_when_they_are_shown(suite_dir):
    """Raw top-k lists are most of a table: with those of all 84 runs of a large suite in memory a report took gigabytes."""
    suite = loading.load(suite_dir)
    for run in suite.runs:
        assert not [name for name in run.contexts if "_top_" in name] and {"KLf_full", "KLf_full_base", "Hs_full_base"} <= set(run.contexts)
    blocks = [b for b in heatmap.build(suite, None, max_bytes=10**7, notes=[])["blocks"] if b["kind"] == "frozen"]
    assert len(blocks) == len(suite.arms) and all(set(b["top"]) == {"student", "teacher", "trained"} for b in blocks)


def test_odd_files_become_notes_and_odd_lines_are_left_out(suite_dir, tmp_path):
    home = tmp_path / "s"
    shutil.copytree(suite_dir, home)
    run = home / "runs" / "random_0.2_seed1"
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"seconds/total": 1.0}\n' + lines)
    (run / "eval.jsonl").write_text('{"accuracy": 1.0}\n{"rollout_id": 1, "accuracy": 0.5, "dataset": "d"}\n')
    (home / "matched_fixed_context_topn.csv").write_text("")
    (home / "context_bank.parquet").write_text("PAR1")
    (home / "suite_summary.csv").write_text("\n")
    facts = json.loads((home / "suite.json").read_text())
    (home / "suite.json").write_text(json.dumps({**facts, "teacher_accuracy": "unknown"}))
    suite = loading.load(home)
    odd = next(r for r in suite.runs if r.name == run.name)
    assert len(odd.metrics) == 6 and loading.eval_at(odd, "after")["accuracy"] == 0.5 and loading.eval_at(odd, "before") is None
    assert suite.topn is None and suite.bank_prompts is None and "teacher_accuracy" not in suite.facts
    assert all(any(name in note for note in suite.notes) for name in ("topn.csv", "context_bank.parquet", "suite_summary.csv"))
    pd.DataFrame({"x": [1]}).to_parquet(home / "context_bank.parquet")
    named = pd.DataFrame({"run_dir": [None, str(run)], "mask": ["tip", "random"], "budget_asked": [None, 0.2], "seed_label": ["a", "b"]})
    named.to_csv(home / "suite_summary.csv", index=False)
    suite = loading.load(home)
    assert suite.bank_prompts is None and [r.name for r in suite.runs] == [run.name]
    (run / "config.yaml").write_text("opd_budget_mask: tip\nopd_budget_ratio: ten\n")
    with pytest.raises(DataError, match="expected a number as opd_budget_ratio, got 'ten'"):
        loading.load(home)


def test_pictures_of_positions_and_the_plane_take_what_is_outside(suite_dir):
    """pos_norm is NaN in some banks, and without normalisation H and D leave 0 to 1."""
    suite = loading.load(suite_dir)
    styles = arm_styles(list(suite.arms))
    samples = {k: loading.sample_bank(r[0], max_rollouts=2, max_rows=10**6, notes=[]) for k, r in suite.arms.items()}
    for sample in samples.values():
        sample.table.loc[::3, "pos_norm"] = np.nan
        sample.table.loc[::2, "H_norm"], sample.table.loc[1::2, "D_norm"] = 1.7, -0.4
    assert figures_tokens.positions(samples, styles).png and figures_tokens.plane(samples, styles).png
