"""The memory of a suite, with a training command that only keeps books (the real one is run by tests/e2e)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ta_opd.errors import ConfigError
from ta_opd.suite import memory as mem
from ta_opd.suite import methods, plan
from ta_opd.suite.process import run_logged, stop_requests
from ta_opd.suite.runner import Suite
from tests.launchers.conftest import ROOT

LAUNCHER = """#!/usr/bin/env bash
if [[ ${DRY_RUN:-0} == 1 ]]; then
  echo "python train.py --opd-budget-mask $OPD_BUDGET_MASK --num-rollout ${NUM_ROLLOUT:-2} --seed $SEED --teacher-port ${TEACHER_PORT:-0}"
  exit "${BAD_SETTING:-0}"
fi
echo "$METHOD_NAME $SEED" >> "$RAN"
if [[ $METHOD_NAME == "${FAILS:-}" ]]; then echo "out of memory" >&2; exit 3; fi
if [[ $METHOD_NAME == "${HANGS:-}" ]]; then echo $$ > "$RAN.pid"; exec sleep 100; fi
mkdir -p "$SAVE_DIR/token_bank"
echo '{"seconds": 1}' > "$SAVE_DIR/DONE"
"""
MERGE = "import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index('--output') + 1]).write_text('merged')\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "scripts/train").mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "scripts/train/run_opd.sh").write_text(LAUNCHER)
    (tmp_path / "tools/merge_token_bank.py").write_text(MERGE)
    return tmp_path


def settings(root, entries="pure_opd:1.0 tip:0.1 entropy:0.1", seeds="seed1", tag="t", **more):
    return plan.Settings(
        root=root, python=sys.executable, output_root=root / "out", log_dir=root / "out/logs", tag=tag,
        entries=tuple(methods.parse_entries(entries)), seeds=tuple(methods.parse_seeds(seeds)), student="/m/Student-1.5", teacher="/m/t",
        prompt_data="/d/dapo.jsonl", top_k=16, max_response_len=64, skip_eval=True, **more,
    )  # fmt: skip


def run(root, environment=None, force=False, on_error="continue", **more):
    env = {"PATH": os.environ["PATH"], "RAN": str(root / "ran"), **(environment or {})}
    return Suite(settings(root, **more), env, force=force, on_error=on_error).run()


def ran(root):
    path = root / "ran"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_finished_runs_are_skipped(root):
    result = run(root)
    assert ran(root) == ["pure_opd", "tip", "entropy"]
    assert {k: len(v) for k, v in result.rows.items()} == {"done": 3} and result.exit_code == 0
    again = run(root)
    assert ran(root) == ["pure_opd", "tip", "entropy"]
    assert {k: len(v) for k, v in again.rows.items()} == {"skipped": 3} and again.exit_code == 0


def test_names_say_the_budget_without_doubt(root):
    run(root, entries="tip:0.05:30")
    assert (root / "out/student_1p5_dapo_budget_k16_r0p05_tip_max64_seed1_t/DONE").exists()
    assert (root / "out/t/method_mapping.csv").read_text().splitlines() == [
        "method,mask,ratio,idx,notes", "tip,tip,0.05,30,soft-OR of entropy and raw divergence",
    ]  # fmt: skip


def test_a_failed_run_is_reported_and_the_rest_go_on(root, capsys):
    result = run(root, {"FAILS": "tip"})
    assert ran(root) == ["pure_opd", "tip", "entropy"]
    assert {k: len(v) for k, v in result.rows.items()} == {"done": 2, "failed": 1} and result.exit_code == 1
    assert "tip 0.1 seed1: train failed: exit code 3" in (err := capsys.readouterr().err) and "out of memory" in err
    assert run(root).exit_code == 0  # the next call runs just that one
    assert ran(root) == ["pure_opd", "tip", "entropy", "tip"]


def test_on_error_stop(root):
    result = run(root, {"FAILS": "tip"}, on_error="stop")
    assert ran(root) == ["pure_opd", "tip"]
    assert {k: len(v) for k, v in result.rows.items()} == {"done": 1, "failed": 1, "pending": 1} and result.exit_code == 1


def test_a_run_that_ends_well_but_writes_nothing_has_failed(root, capsys):
    (root / "scripts/train/run_opd.sh").write_text(LAUNCHER.replace("echo '{\"seconds\": 1}'", "true"))
    text = (root / "scripts/train/run_opd.sh").read_text().replace('> "$SAVE_DIR/DONE"', "")
    (root / "scripts/train/run_opd.sh").write_text(text)
    assert run(root).exit_code == 1
    assert "it did not write" in capsys.readouterr().err


def test_force_runs_anew_and_keeps_the_old(root):
    run(root, entries="tip:0.1")
    run(root, entries="tip:0.1", force=True)
    assert ran(root) == ["tip", "tip"]
    assert len(list((root / "out").glob("*_tip_*.old_*/DONE"))) == 1


def test_changed_settings_are_refused_with_what_changed(root):
    run(root, entries="tip:0.1")
    with pytest.raises(ConfigError, match=r"finished with other settings: --num-rollout 2 -> --num-rollout 9.*FORCE=1"):
        run(root, {"NUM_ROLLOUT": "9"}, entries="tip:0.1")
    assert run(root, {"TEACHER_PORT": "9000"}, entries="tip:0.1").exit_code == 0  # where it runs may change
    assert ran(root) == ["tip"]


def test_seeds_multiply_the_rows(root):
    run(root, entries="tip:0.1 entropy:0.1", seeds="seed1 seed2")
    assert (root / "ran").read_text().splitlines() == ["tip 1234", "entropy 1234", "tip 1235", "entropy 1235"]


def test_a_bad_row_stops_everything_before_the_start(root):
    with pytest.raises(ConfigError, match="row pure_opd:1"):
        run(root, {"BAD_SETTING": "2"})
    assert ran(root) == []
    assert not (root / "out").exists()


def test_fixed_ports_are_bases(root):
    rows = plan.make_rows(settings(root, entries="tip:0.1:30 entropy:0.1:7"), {"TEACHER_PORT": "14141", "RAY_PORT": "auto"})
    assert [r.env["TEACHER_PORT"] for r in rows] == ["14171", "14148"]
    assert "RAY_PORT" not in rows[0].env
    with pytest.raises(ConfigError, match="expected different ports"):
        run(root, {"TEACHER_PORT": "9000", "RAY_PORT": "9000"})


def test_two_calls_on_one_directory_do_not_meet(root):
    with mem.directory_lock(root / "out/t"):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*choose another TAG"):
            run(root)
        assert run(root, tag="other", entries="tip:0.1").exit_code == 0
    assert run(root, entries="tip:0.1").exit_code == 0


HOLDER = """
import os, subprocess, sys
from pathlib import Path
from ta_opd.suite.memory import directory_lock
with directory_lock(Path(sys.argv[1])) as lock:
    print(subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)
    os._exit(0)
"""


def test_what_a_killed_suite_left_keeps_the_next_one_waiting(root):
    def leave(seconds):
        words = [sys.executable, "-c", HOLDER, str(root / "out/t"), str(seconds)]
        return int(subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True).stdout)

    left = leave(100)
    with pytest.raises(ConfigError, match=r"in use by what process \d+ on .* started and left"), mem.directory_lock(root / "out/t", 0.3):
        pass
    os.kill(left, signal.SIGKILL)
    left = leave(1)
    with mem.directory_lock(root / "out/t", 60):
        assert not _alive(left)


def test_a_broken_memory_is_said(root):
    (root / "out/t").mkdir(parents=True)
    (root / "out/t/suite_state.json").write_text("{")
    with pytest.raises(Exception, match="move the file away"):
        run(root)


def test_lost_memory_does_not_repeat_finished_runs(root):
    run(root, entries="tip:0.1")
    (root / "out/t/suite_state.json").unlink()
    run(root, entries="tip:0.1")
    assert ran(root) == ["tip"]


def test_a_dead_suites_running_step_counts_as_interrupted(root):
    memory = mem.Memory(root / "state.json")
    memory.set("row", "train", status=mem.RUNNING)
    again = mem.Memory(root / "state.json")
    assert again.get("row", "train")["status"] == mem.INTERRUPTED
    assert again.status("row", ("train", "merge")) == mem.INTERRUPTED
    again.set("row", "train", status=mem.DONE)
    assert again.status("row", ("train", "merge")) == mem.PENDING
    again.set("row", "merge", status=mem.DONE)
    assert again.status("row", ("train", "merge")) == mem.DONE


SUITE_PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.launchers.test_suite_runner import run
result = run(Path(sys.argv[1]), {"HANGS": "tip"})
print(sorted(result.rows))
sys.exit(result.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_in_the_middle_and_called_again(root, number):
    """Its own processes go, others stay, and the next call goes on where it was."""
    bystander = subprocess.Popen(["sleep", "100"])
    suite = subprocess.Popen([sys.executable, "-c", SUITE_PROCESS, str(root), str(ROOT)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid_file = root / "ran.pid"
    deadline = time.time() + 120
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert suite.poll() is None and time.time() < deadline
        time.sleep(0.1)
    child = int(pid_file.read_text())
    suite.send_signal(number)
    assert suite.wait(60) == (130 if number != signal.SIGKILL else -9)
    deadline = time.time() + 30
    while _alive(child):
        assert time.time() < deadline, "the training command outlived its suite"
        time.sleep(0.1)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    state = json.loads((root / "out/t/suite_state.json").read_text())
    tip = next(v for k, v in state.items() if "_tip_" in k)
    assert tip["train"]["status"] == ("running" if number == signal.SIGKILL else "interrupted")
    assert run(root).exit_code == 0
    assert ran(root) == ["pure_opd", "tip", "tip", "entropy"]


def _alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_process_that_ignores_ctrl_c_is_ended(tmp_path):
    with stop_requests() as stop:
        stop.append(signal.SIGINT)
        stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
        started = time.monotonic()
        outcome = run_logged([sys.executable, "-c", stubborn], log=tmp_path / "log", stop=stop, grace=0.5)
    assert outcome.interrupted and outcome.returncode < 0
    assert time.monotonic() - started < 20


def test_time_limit_and_log(tmp_path):
    outcome = run_logged(["bash", "-c", "echo hello; sleep 60"], log=tmp_path / "a/log", limit=1.0, grace=1.0)
    assert outcome.timed_out and not outcome.interrupted
    assert "$ bash -c" in (tmp_path / "a/log").read_text() and "hello" in (tmp_path / "a/log").read_text()


def test_identity_leaves_out_where_it_runs():
    text = "env CUDA_VISIBLE_DEVICES=0 python train.py \\\n  --lr 1e-6 \\\n  --teacher-port 5 \\\n  --rollout-shuffle \\\n  --load /x"
    assert plan.identity_of(text) == ("--lr 1e-6", "--rollout-shuffle")
    assert plan.differences(("--lr 1",), ("--lr 2", "--trace")) == "--lr 1 -> --lr 2; --trace absent -> --trace"
    with pytest.raises(ConfigError, match="expected a train.py command"):
        plan.identity_of("python other.py")


def test_a_budget_reaches_its_run_with_all_its_digits(root):
    rows = plan.make_rows(settings(root, entries="entropy:0.12345678 tip:0.10 pure_opd:1.0 random:1e-5"), {})
    assert [row.env["OPD_BUDGET_RATIO"] for row in rows] == ["0.12345678", "0.1", "1", "1e-05"]


def test_a_suite_of_asynchronous_runs_knows_them_from_others():
    asynchronous = plan.identity_of("python /p/train_async.py --lr 1e-6")
    assert asynchronous == ("--lr 1e-6", "train_async.py")
    assert "train_async.py" in plan.differences(plan.identity_of("python /p/train.py --lr 1e-6"), asynchronous)
