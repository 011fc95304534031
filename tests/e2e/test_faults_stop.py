"""SIGTERM: the rollout is finished and saved, the run ends with 0, the next one goes on. Without a checkpoint it ends with 143."""

import signal
import time

import pytest

from tests.e2e.live import LiveRun

pytestmark = pytest.mark.e2e


def test_sigterm_finishes_the_rollout_saves_and_the_next_run_goes_on(task, servers, tmp_path):
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000")
    try:
        run.wait_rows(2)
        run.process.send_signal(signal.SIGTERM)
        output = run.ends(0)
    finally:
        run.stop()
    last = run.rows()[-1]["rollout_id"]
    assert "SIGTERM: this rollout is finished" in output and f"stopped after rollout {last}" in output
    assert (run.checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert not (run.dir / "DONE").exists()
    again = LiveRun(task, tmp_path / "run", *services, "--num-rollout", str(last + 3))
    try:
        again.ends(0)
    finally:
        again.stop()
    assert (again.dir / "DONE").exists()
    again.check_samples(last + 3)


def test_sigterm_while_starting_loses_nothing(task, servers, tmp_path):
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000")
    try:
        run.wait(lambda: run.named("raylet"), "Ray")
        time.sleep(0.5)
        run.process.send_signal(signal.SIGTERM)
        assert "nothing was lost" in run.ends(0)
    finally:
        run.stop()
