"""Teachers that are somebody else's fail; SIGTERM: the rollout is finished and saved, the run ends with 0, the next one goes on. Without a checkpoint it ends with 143."""

import signal
import time

import pytest

from tests.e2e.live import LiveRun
from tests.e2e.proxy import Proxy

pytestmark = pytest.mark.e2e


def test_external_teachers_fail_in_every_way_then_sigterm_saves_and_the_next_run_goes_on(task, servers, tmp_path):
    """Two replicas of a teacher that is not the run's: one fails, the other takes over; both are away, the run waits and says so."""
    one, two = Proxy(servers.teacher), Proxy(servers.teacher)
    services = ["--rm-url", one.url, two.url, "--rollout-external-engine-addrs", servers.student, "--request-timeout", "3", "--skip-probe"]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "1000")
    try:
        run.wait_rows(1)
        for mode in ("cut", "hang"):
            one.mode, before = mode, one.replies
            run.wait_rows(len(run.rows()) + 2)
            assert one.replies > before  # it was asked, and the other one in its place
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
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student, "--allow-teacher-change"]
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
