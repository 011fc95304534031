"""Runs on servers that are somebody else's: teachers fail, SIGTERM comes, the disk is full; the next run always goes on."""

import os
import signal
import time

import psutil
import pytest

from tests.e2e.live import LiveRun
from tests.e2e.proxy import Proxy

pytestmark = pytest.mark.e2e


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: about a minute and a half")
def test_external_teachers_fail_then_sigterm_then_a_full_disk(task, servers, tmp_path):
    """Two replicas of a teacher that is not the run's: one fails, the other takes over; both are away, the run waits and says so."""
    one, two = Proxy(servers.teacher), Proxy(servers.teacher)
    services = ["--rm-url", one.url, two.url, "--rollout-external-engine-addrs", servers.student, "--request-timeout", "3", "--skip-probe"]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000")
    try:
        run.wait_rows(1)
        for mode in ("cut", "hang"):
            one.mode, before = mode, one.replies
            run.wait(lambda before=before: one.replies > before, f"a reply that is {mode}")
            run.wait_rows(len(run.rows()) + 2)  # the other one was asked in its place
        one.mode = "ok"
        one.down()
        run.wait_rows(len(run.rows()) + 2)
        two.down()
        run.wait_said(r"teacher at .* is away .*trying again for up to 600 s")
        rows = len(run.rows())
        two.up()
        run.wait_rows(rows + 2)
        run.process.send_signal(signal.SIGTERM)
        output = run.ends(0)
    finally:
        run.stop()
        one.down(), two.down()
    last = run.rows()[-1]["rollout_id"]
    assert "SIGTERM: this rollout is finished" in output and f"stopped after rollout {last}" in output
    assert (run.checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert not (run.dir / "DONE").exists()
    # the next run goes on, until its disk is full: one error, the checkpoint before is whole
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student, "--allow-teacher-change"]
    full = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000", "--save-interval", "1")
    try:
        full.wait_rows(last + 3)
        (trainer,) = full.named("ray::TrainActor")
        trainer.rlimit(psutil.RLIMIT_FSIZE, (200_000, trainer.rlimit(psutil.RLIMIT_FSIZE)[1]))  # less than a checkpoint's file
        output = full.ends(2)
    finally:
        full.stop()
    assert "error: checkpoint of rollout" in output and "could not be written" in output and "the newest whole one is" in output
    newest = (full.checkpoints / "latest_checkpointed_iteration.txt").read_text()
    assert [p.name for p in full.checkpoints.iterdir() if p.name.startswith(".")] == []
    assert max(full.checkpoints.glob("iter_*")).name == f"iter_{int(newest):07d}"
    rollouts = len(full.rows()) + 2
    again = LiveRun(task, tmp_path / "run", *services, "--num-rollout", str(rollouts))
    try:
        again.ends(0)
    finally:
        again.stop()
    assert (again.dir / "DONE").exists()
    again.check_samples(rollouts)


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
