"""train_async.py is hurt while a rollout is sampled ahead: its engine is killed, then SIGTERM. By hand, with TA_OPD_SLOW=1."""

import os
import signal

import pytest

from tests.e2e.live import LiveRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: minutes")]
ASYNC = "train_async.py"


def test_a_killed_engine_and_then_sigterm(task, servers, tmp_path):
    flags = ["--rm-url", f"{servers.teacher}/generate", "--rollout-max-response-len", "96", "--opd-loss-type", "topk_reverse_kl",
             "--allow-teacher-change"]  # fmt: skip
    run = LiveRun(task, tmp_path / "run", *flags, "--num-rollout", "1000", script=ASYNC)
    try:
        run.wait_rows(2)
        # its only engine, while it samples the rollout after the one that trains
        run.wait_sampling()
        (scheduler,) = run.named("sglang::scheduler")
        rows = len(run.rows())
        os.kill(scheduler.pid, signal.SIGKILL)
        run.wait_said("restarted student_0")
        run.wait_rows(rows + 3)
        assert run.output.count("restarted student_0") == 1
        # the end in the middle of a rollout: what was sampled ahead is not trained, and not lost
        run.wait_sampling()
        run.process.send_signal(signal.SIGTERM)
        output = run.ends(0)
    finally:
        run.stop()
    last = run.rows()[-1]["rollout_id"]
    assert "SIGTERM: this rollout is finished" in output and f"stopped after rollout {last}" in output and "error:" not in output
    assert (run.checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert not (run.dir / "DONE").exists()
    assert max(row["rollout/staleness_max"] for row in run.rows()) == 1
    rollouts = last + 4
    again = LiveRun(task, tmp_path / "run", *flags, "--num-rollout", str(rollouts), script=ASYNC)
    try:
        again.ends(0, 240)
    finally:
        again.stop()
    assert (again.dir / "DONE").exists() and again.rows()[last + 1]["rollout/staleness"] == 0  # sampled anew, with the saved weights
    again.check_samples(rollouts)


def test_sigterm_without_a_place_to_save_says_what_was_lost(task, servers, tmp_path):
    """Nothing can be saved, so the step is aborted at once: exit code 143, and no process stays."""
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student, "--save", ""]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000", script=ASYNC)
    try:
        run.wait_rows(2)
        run.process.send_signal(signal.SIGTERM)
        output = run.ends(143)
    finally:
        run.stop()
    assert "no checkpoint holds what was trained" in output
