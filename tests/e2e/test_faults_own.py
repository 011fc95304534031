"""One run with servers of its own, killed piece by piece: student engine, teacher, trainer, rollout manager, driver.

After each fault the run goes on or ends with one clear error, nothing of it is left behind, and the next run goes on where the
newest checkpoint is. Over all of them every sample is trained exactly once.
"""

import os
import signal

import psutil
import pytest

from tests.e2e.live import LiveRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: minutes")]
LONG = ["--rollout-max-response-len", "96", "--opd-loss-type", "topk_reverse_kl", "--save-interval", "1", "--num-rollout", "1000"]


def kill(*processes: psutil.Process) -> None:
    assert processes
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def mains_of(run: LiveRun, model) -> list[psutil.Process]:
    """The main processes of the run's servers for `model`: more than one while a dead one is replaced."""
    supervisors = {p.pid for p in run.named("supervise.py", str(model))}
    return [p for p in run.named("sglang_utils.launch", str(model)) if p.pid not in supervisors]


def server_of(run: LiveRun, model) -> psutil.Process:
    """The main process of the run's server for `model`."""
    (main,) = mains_of(run, model)
    return main


def test_a_run_survives_what_kills_its_parts(task, servers, tmp_path):
    folder = tmp_path / "run"
    own = ["--teacher-model", str(task.teacher), *LONG]
    run = LiveRun(task, folder, *own, "--max-restarts", "1")
    try:
        run.wait_rows(1)
        # a student engine, by its scheduler, while it samples: the rollout starts over on a new one with the current weights
        run.wait_sampling()
        first = server_of(run, task.student)
        kill(next(p for p in first.children() if "scheduler" in " ".join(p.cmdline())))
        # and the one that takes its place, while it starts
        kill(run.wait(lambda: next((p for p in mains_of(run, task.student) if p.pid != first.pid), None), "another engine"))
        run.wait_said("student_0 died while starting; starting again")
        run.wait_said("restarted student_0")
        run.wait_rows(len(run.rows()) + 2)
        # the only teacher, while it is needed: it is started again and the requests wait for it
        run.wait_sampling()
        kill(server_of(run, task.teacher))
        run.wait_said("teacher_0 died; starting it again")
        run.wait_said("teacher_0 is back")
        run.wait_rows(len(run.rows()) + 2)
        assert run.output.count("restarted student_0") == 1
        # the trainer: everything is stopped and the run starts over from the newest checkpoint
        kill(*run.named("ray::TrainActor"))
        run.wait_said("starting over from the checkpoint of rollout")
        assert "a trainer rank" in run.output
        run.wait(lambda: run.named("ray::TrainActor"), "a new trainer")
        run.wait_rows(len(run.rows()) + 2)
        # the rollout manager, with no restart left: one clear error, and everything is stopped
        kill(*run.named("ray::RolloutManager"))
        output = run.ends(2)
    finally:
        run.stop()
    assert "error: the rollout manager" in output and "It died 2 times" in output and f"--load {folder}" in output
    # the driver itself, by a signal that it cannot answer: nothing is left either
    again = LiveRun(task, folder, *own)
    try:
        rows = len(again.rows())
        again.wait(lambda: len(again.rows()) > rows, "a new row")
        again.look()
        again.process.kill()
        again.process.wait()
        left = again.left()
        assert not left, f"left behind: {left}"
    finally:
        again.stop()
    # and after all of that a run on the same directory goes on to its end
    rollouts = len(again.rows()) + 2
    services = ["--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student, "--allow-teacher-change"]
    last = LiveRun(task, folder, *services, *LONG[:-1], str(rollouts))
    try:
        last.ends(0)
    finally:
        last.stop()
    last.check_samples(rollouts)
