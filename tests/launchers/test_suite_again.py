"""A suite that is called again with something changed: nothing old passes for new, and nothing is refused for where it runs."""

import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest

from ta_opd.errors import ConfigError, DataError
from ta_opd.suite import memory as mem
from ta_opd.suite import methods, plan, process, summary
from ta_opd.suite.runner import Suite

LAUNCHER = """#!/usr/bin/env bash
if [[ ${DRY_RUN:-0} == 1 ]]; then echo "python train.py --opd-budget-mask $OPD_BUDGET_MASK"; exit; fi
mkdir -p "$SAVE_DIR/token_bank"
echo '{"seconds": 1}' > "$SAVE_DIR/DONE"
"""
TOOL = """import pathlib, sys
words = dict(zip(sys.argv[1:], sys.argv[2:]))
out = pathlib.Path(words.get("--output") or words["--output-dir"])
target = {"fixed": out, "from_megatron": out / "fixed_context_metrics.parquet", "gain": out / "regression_summary.csv"}[KIND]
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(words.get("--max-samples") or words.get("--origin-hf-dir") or "x")
"""
TOOLS = {
    "merge_token_bank": "fixed", "export_fixed_context_bank": "fixed", "eval_fixed_context_bank": "fixed",
    "eval_fixed_context_from_megatron": "from_megatron", "analyze_fixed_context_gain": "gain",
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "scripts/train").mkdir(parents=True)
    (tmp_path / "scripts/train/run_opd.sh").write_text(LAUNCHER)
    (tmp_path / "tools").mkdir()
    for name, kind in TOOLS.items():
        (tmp_path / "tools" / f"{name}.py").write_text(f"KIND = {kind!r}\n{TOOL}")
    return tmp_path


def settings(root, **more):
    shared = {
        "root": root, "python": sys.executable, "output_root": root / "out", "log_dir": root / "logs", "tag": "t", "student": "/m/A",
        "entries": tuple(methods.parse_entries("tip:0.1")), "seeds": tuple(methods.parse_seeds("seed1 seed2")), "teacher": "/m/t",
        "prompt_data": "/d/p.jsonl", "top_k": 16, "max_response_len": 64, "contexts": 300,
    }  # fmt: skip
    return plan.Settings(**(shared | more))


def run(root, force=False, **more):
    return Suite(settings(root, **more), {"PATH": os.environ["PATH"]}, force=force).run()


def test_other_contexts_are_scored_again(root):
    """With CONTEXT_SAMPLES changed the bank is made anew; rows that were finished must not keep scores of the old one."""
    assert len(run(root).rows["done"]) == 2
    assert len(run(root).rows["skipped"]) == 2
    again = run(root, contexts=100)
    assert len(again.rows["done"]) == 2
    state = json.loads((root / "out/t/suite_state.json").read_text())
    assert (root / "out/t/baseline/context_bank.parquet").read_text() == "100"
    bank_made = state["baseline"]["score_before"]["ended"]
    assert all(steps["score_after"]["ended"] >= bank_made for name, steps in state.items() if name != "baseline")


def test_another_student_needs_another_tag(root):
    """Directories of scores have no student in their names: its numbers would have passed for the first one's."""
    run(root)
    for other in ({"student": "/m/B"}, {"top_k": 8}, {"max_response_len": 128}, {"prompt_data": "/d/q.jsonl"}):
        with pytest.raises(ConfigError, match="expected one student, prompt file, K and response length in a TAG"):
            run(root, **other)
    assert run(root, student="/m/B", tag="u").exit_code == 0
    assert run(root, student="/m/B", force=True).exit_code == 0
    assert [p.read_text() for p in (root / "out/t").glob("tip_r0p10_seed*.old_*/*.parquet")] == ["/m/A", "/m/A"]
    assert run(root, skip_eval=True, student="/m/C").exit_code == 0


def test_where_servers_bind_and_the_locale_do_not_count():
    here = "python train.py --lr 1 --sglang-host 10.0.0.1 --use-sglang-router --optimizer-cpu-offload"
    assert plan.identity_of(here) == plan.identity_of("python train.py --lr 1")
    words = "python train.py --opd-teacher-name $VALUE"
    texts = []
    for locale in ("C", "C.UTF-8"):
        value = subprocess.run(["bash", "-c", "printf %q \"$1\"", "-", "zähl 'a' \\ $x\n2"], env={"LC_ALL": locale}, capture_output=True, check=True).stdout
        texts.append(words.replace("$VALUE", value.decode()))
    assert {plan.identity_of(text) for text in texts} == {("--opd-teacher-name zähl 'a' \\ $x\n2",)}


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"row": 1}', '{"row": {"train": "done"}}', '{"row": {"train": {}}}'])
def test_a_memory_of_another_form_is_said(tmp_path, text):
    (tmp_path / "suite_state.json").write_text(text)
    with pytest.raises(DataError, match="expected the JSON state of a suite, .*move the file away"):
        mem.Memory(tmp_path / "suite_state.json")


def test_means_leave_out_unfinished_runs(root):
    """A run that was stopped has a row with what it logged, but is no repetition of the others."""
    chosen = settings(root)
    rows = plan.make_rows(chosen, {})
    for row, count in zip(rows, (10, 3), strict=True):
        row.run_dir.mkdir(parents=True)
        lines = [{"rollout_id": i, "rollout/kept_tokens": 10, "rollout/valid_tokens": 100, "rollout/reverse_kl_valid": 1 - i / 10} for i in range(count)]
        (row.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (rows[0].run_dir / "DONE").write_text('{"seconds": 5}')
    table = summary.summarize(chosen, rows, mem.Memory(root / "none.json"))
    assert table["reverse_kl_last"].notna().all()
    line = summary.over_seeds(table).iloc[0]
    assert line["reverse_kl_last"] == pytest.approx(table["reverse_kl_last"].iloc[0]) and math.isnan(line["reverse_kl_last_low"])
    nothing = summary.over_seeds(table.assign(train_seconds=math.nan))
    assert isinstance(nothing, pd.DataFrame) and nothing["reverse_kl_last"].isna().all()


def test_commands_start_where_there_is_no_prctl(tmp_path, monkeypatch):
    """macOS: no such system call, and no /proc to look processes up in."""
    monkeypatch.setattr(process.sys, "platform", "darwin")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: object())
    outcome = process.run_logged(["bash", "-c", "echo 'two  words'"], log=tmp_path / "log")
    assert outcome.returncode == 0 and "$ bash -c 'echo '" in (tmp_path / "log").read_text()


def test_holders_that_live_and_are_gone():
    import socket

    ended = subprocess.Popen(["true"])
    ended.wait()
    there = "process {} on " + socket.gethostname() + " since 2026-01-01 00:00:00"
    assert mem._is_gone(there.format(ended.pid)) and not mem._is_gone(there.format(os.getpid())) and not mem._is_gone(there.format(1))
    assert not mem._is_gone("process 1 on elsewhere since now") and not mem._is_gone("another process")


def test_a_flag_that_is_there_twice_is_compared_whole():
    old, new = ("--lr 1", "--teacher a=/x", "--teacher b=/y"), ("--lr 1", "--teacher a=/z", "--teacher b=/y")
    assert plan.differences(old, new) == "--teacher a=/x -> --teacher a=/z"
    assert plan.differences(list(old), old[:2]) == "--teacher b=/y -> --teacher absent"
