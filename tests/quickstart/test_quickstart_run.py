"""The quick start's plan, its processes and its goals; the whole of it on the real stack in the e2e test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from examples.quickstart import plan, processes, run
from ta_opd.errors import ConfigError, ServiceError

ROOT = Path(__file__).resolve().parents[2]


def make_plan(home: Path, **changes):
    options = {"methods": plan.METHODS, "seeds": "seed1 seed2", "steps": 7} | changes
    return plan.plan(home, student=home / "s", train_file=home / "t.jsonl", heldout_file=home / "h.jsonl", **options)


def test_plan_gives_every_method_the_same_seeds_and_rollouts(tmp_path):
    runs = make_plan(tmp_path)
    assert [r.name for r in runs[:4]] == ["full_r1p00_seed1", "dlearn_high_r0p10_seed1", "entropy_r0p10_seed1", "random_r0p10_seed1"]
    assert len({r.directory for r in runs}) == 8
    same = ("--num-rollout", "--seed", "--rollout-seed", "--opd-budget-mask-seed", "--prompt-data", "--hf-checkpoint")
    for first, second in ((runs[0], runs[3]), (runs[4], runs[7])):
        for flag in same:
            assert first.flags[first.flags.index(flag) + 1] == second.flags[second.flags.index(flag) + 1]
    assert runs[0].flags[runs[0].flags.index("--seed") + 1] != runs[4].flags[runs[4].flags.index("--seed") + 1]


def test_train_py_knows_every_flag_of_the_plan_and_of_the_config(tmp_path):
    from slime.utils.arguments import parse_args

    planned = make_plan(tmp_path)[1]
    command = plan.command(planned, "http://127.0.0.1:1", "http://127.0.0.1:2")
    args = parse_args(command[2:])
    assert (args.opd_budget_mask, args.opd_budget_ratio, args.num_rollout) == ("dlearn_high", 0.1, 7)
    assert (args.opd_loss_type, args.opd_topk_metrics_k, args.lr, args.weight_decay) == ("topk_reverse_kl", 16, 3e-4, 0.0)
    assert args.rollout_batch_size * args.n_samples_per_prompt == args.global_batch_size == 64
    assert args.rm_url == ["http://127.0.0.1:2/generate"] and args.rollout_external_engine_addrs == ["http://127.0.0.1:1"]
    assert args.eval_prompt_data == ["heldout", str(tmp_path / "h.jsonl")] and args.opd_token_bank_raw_topk


def test_servers_and_runs_agree_on_the_context_length():
    import yaml

    config = yaml.safe_load(plan.CONFIG.read_text())
    assert config["rollout-max-context-len"] == run.CONTEXT
    assert config["rollout-max-response-len"] == run.MAX_RESPONSE
    assert config["opd-topk-metrics-k"] == run.TOPK


@pytest.mark.parametrize(
    "changes, match",
    [({"steps": 0}, "--steps"), ({"methods": "telepathy:0.1"}, "telepathy"), ({"methods": "entropy:2"}, "ratio"), ({"seeds": ""}, "SEEDS")],
)
def test_plan_refuses_what_cannot_be_run(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        make_plan(tmp_path, **changes)


def test_a_run_counts_as_finished_only_with_the_same_settings(tmp_path):
    first = make_plan(tmp_path)[0]
    assert not first.finished
    first.remember()
    assert not first.finished  # no DONE: it was interrupted
    (first.directory / "DONE").write_text("{}")
    assert first.finished
    assert not make_plan(tmp_path, steps=8)[0].finished
    (first.directory / "quickstart.json").write_text("{")
    assert not first.finished


def test_failing_training_shows_the_end_of_its_log(tmp_path):
    script = "print('a'); print('step\\rstep 2'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(ServiceError, match="exit code 3") as error:
        processes.train([sys.executable, "-c", script], log=tmp_path / "logs" / "x.log", environment=processes.environment(1))
    assert "the reason" in str(error.value) and "step\r" not in str(error.value)
    assert b"step 2" in (tmp_path / "logs" / "x.log").read_bytes()


def test_training_environment_hides_gpus_and_keeps_the_rest(monkeypatch):
    monkeypatch.setenv("SOMETHING", "kept")
    env = processes.environment(3)
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["OMP_NUM_THREADS"] == "3" and env["SOMETHING"] == "kept"


def test_ending_a_child_ends_that_child_only():
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        processes._end(child, patience=(0.1, 0.3, 5.0))
        assert child.poll() is not None and other.poll() is None
    finally:
        for process in (child, other):
            process.kill()
            process.wait()


def test_memory_of_children_is_counted():
    with processes.MemoryWatch(interval=0.05) as before:  # this process may have other children: servers of other tests
        time.sleep(0.5)
    with processes.MemoryWatch(interval=0.05) as watch:
        child = subprocess.Popen([sys.executable, "-c", "x = bytearray(80 << 20); print('up', flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        child.stdout.readline()
        time.sleep(1.0)
        child.communicate(b"\n")
    assert watch.peak > 80 << 20
    assert 70 << 20 < watch.peak - before.peak < 200 << 20


def test_goals_are_about_full_opd():
    table = pd.DataFrame({"mask": ["full", "random"], "gap_closed": [0.5, 0.1], "kl_drop": [0.2, 0.9]})
    reached = run.goals(table)
    assert [ok for _, ok in reached] == [True, False]
    assert "50%" in reached[0][0] and "not reached" in reached[1][0]
    assert run.goals(table[table["mask"] == "random"]) == []
    assert [ok for _, ok in run.goals(table.assign(gap_closed=np.nan))][0] is False


@pytest.mark.parametrize("argv, words", [(["--contexts", "0"], "--contexts"), (["--methods", "nonsense:1"], "nonsense"), (["--steps", "0"], "--steps"),
                                         (["--teacher-steps", "0"], "--teacher-steps")])  # fmt: skip
def test_wrong_options_end_at_once_with_one_line(tmp_path, argv, words, capsys):
    assert run.main(["--output-dir", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
@pytest.mark.slow
def test_whole_quick_start_on_the_real_stack(tmp_path):
    command = [sys.executable, str(ROOT / "slime_ta_opd" / "examples" / "quickstart" / "run.py"), "--output-dir", str(tmp_path), "--steps", "6",
               "--methods", "pure_opd:1.0 teachability:0.10", "--contexts", "40", "--teacher-steps", "360"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = pd.read_csv(tmp_path / "report" / "summary.csv").set_index("mask")
    assert list(summary.index) == ["full", "dlearn_high"]
    assert summary["accuracy_before"].nunique() == 1 and 0.2 <= summary["accuracy_before"].iloc[0] <= 0.6
    assert summary["kl_before"].nunique() == 1
    assert summary.loc["full", "kl_after"] < 0.9 * summary.loc["full", "kl_before"]
    assert summary.loc["full", "accuracy_after"] > summary.loc["full", "accuracy_before"]
    assert summary.loc["dlearn_high", "budget_real"] == pytest.approx(0.1, abs=0.01)
    page = (tmp_path / "report.html").read_text()
    assert 'id="heat-data"' in page and "Frozen contexts" in page
    first = [json.loads(line) for line in (tmp_path / "runs" / "full_r1p00_seed1" / "metrics.jsonl").read_text().splitlines()]
    assert len(first) == 6
    # A second call keeps the finished runs and only makes the report again.
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("finished before with these settings, kept") == 2
