"""A run with two replicas of its own teacher: one is killed, then the actors that own servers. By hand, with TA_OPD_SLOW=1.

Others take over, what died comes back, no process outlives its owner, and every sample is trained exactly once.
"""

import os
import signal

import psutil
import pytest

from tests.e2e.live import LiveRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: minutes")]


def supervisor_of(run: LiveRun, name: str) -> psutil.Process:
    """The process that sees to the run's server `name` (student_0, teacher_1): its log is what it writes to."""
    log = str(run.dir / "logs" / f"{name}.log")
    found = [p for p in run.named("supervise.py") if os.path.realpath(f"/proc/{p.pid}/fd/1") == os.path.realpath(log)]
    assert len(found) == 1, (name, [p.cmdline() for p in found])
    return found[0]


def prefills(run: LiveRun, name: str) -> int:
    return (run.dir / "logs" / f"{name}.log").read_text(errors="replace").count("Prefill batch")


def kill_owner(run: LiveRun, name: str) -> list[psutil.Process]:
    """Kills the actor that owns a server, with SIGKILL; the server's processes, which nobody has told to stop."""
    supervisor = supervisor_of(run, name)
    tree = [supervisor, *supervisor.children(recursive=True)]
    assert len(tree) >= 4  # supervisor, main process, scheduler, detokenizer
    owner = supervisor.parent()
    assert "ServerActor" in " ".join(owner.cmdline())
    owner.kill()
    return tree


def ended(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there although their owner died some seconds ago."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_replica_of_the_runs_own_teacher_and_the_owners_of_servers_are_killed(task, tmp_path):
    flags = ["--teacher-model", str(task.teacher), "--teacher-num-gpus", "2", "--num-rollout", "1000", "--rollout-max-response-len", "96",
             "--opd-loss-type", "topk_reverse_kl"]  # fmt: skip
    run = LiveRun(task, tmp_path / "run", *flags)
    try:
        run.wait_rows(1)
        assert min(prefills(run, "teacher_0"), prefills(run, "teacher_1")) >= 1  # both were scoring
        # one replica, while it is needed: the other one answers in its place until it is back
        run.wait_sampling("teacher_1.log")
        (main,) = [p for p in supervisor_of(run, "teacher_1").children() if "sglang_utils.launch" in " ".join(p.cmdline())]
        os.kill(main.pid, signal.SIGKILL)
        rows, before = len(run.rows()), prefills(run, "teacher_0")
        run.wait_rows(rows + 2)
        assert "teacher_1 is back" not in run.output and prefills(run, "teacher_0") > before
        run.wait_said("teacher_1 is back")
        run.wait_sampling("teacher_1.log")
        assert "starting over" not in run.output and "teacher_0 died" not in run.output
        # the owner of a teacher's server: the server ends with it, and both come back
        run.wait_sampling("teacher_0.log")
        orphans = kill_owner(run, "teacher_0")
        assert not ended(orphans)
        run.wait_said("teacher_0 is back")
        run.wait_sampling("teacher_0.log")
        # the owner of the only student engine: the rollout starts over on a new one
        run.wait_sampling()
        orphans = kill_owner(run, "student_0")
        assert not ended(orphans)
        run.wait_said("restarted student_0")
        run.wait_rows(len(run.rows()) + 2)
        run.process.send_signal(signal.SIGTERM)
        output = run.ends(0)
    finally:
        run.stop()
    last = run.rows()[-1]["rollout_id"]
    assert f"stopped after rollout {last}" in output and "error:" not in output
    run.check_samples(last + 1)
    rollouts = last + 3
    again = LiveRun(task, tmp_path / "run", *flags, "--num-rollout", str(rollouts))
    try:
        again.ends(0, 240)
    finally:
        again.stop()
    assert (again.dir / "DONE").exists()
    again.check_samples(rollouts)


def test_the_owner_of_a_server_dies_while_the_run_starts(task, servers, tmp_path):
    """Before there is anything to go on with: one clear error that says what died, and nothing stays."""
    services = ["--rm-url", f"{servers.teacher}/generate"]
    run = LiveRun(task, tmp_path / "run", *services, "--num-rollout", "3")
    try:
        run.wait(lambda: run.named("sglang::scheduler"), "an engine that starts")
        supervisor = supervisor_of(run, "student_0")
        (manager,) = run.named("ray::RolloutManager")
        assert manager.environ()["MALLOC_ARENA_MAX"] == "1" and "MALLOC_ARENA_MAX" not in supervisor.environ()
        supervisor.parent().kill()
        output = run.ends(2)
    finally:
        run.stop()
    assert output.count("error:") == 1 and "the owner of a server" in output and "died" in output and "Traceback" not in output
