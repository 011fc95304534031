"""The tool that submits a run to a job server, with a stand-in for Ray's client (tests/e2e/test_existing_cluster.py has a real one)."""

import importlib.util

import ray.job_submission
from ray.job_submission import JobStatus

from tests.launchers.conftest import ROOT


def load_tool():
    spec = importlib.util.spec_from_file_location("run_on_ray", ROOT / "tools/run_on_ray.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_long_log_is_not_asked_for_every_two_seconds(monkeypatch, capsys):
    """The server hands out the whole log each time: 50 MB every two seconds would be most of its work for a long run."""
    tool, clock, asked = load_tool(), Clock(), []

    class Client:
        def __init__(self, address):
            pass

        def submit_job(self, **kwargs):
            return "job"

        def get_job_status(self, job):
            return JobStatus.SUCCEEDED if clock.now >= 600 else JobStatus.RUNNING

        def get_job_logs(self, job):
            asked.append(clock.now)
            return "x" * (10_000 if clock.now < 60 else 50_000_000) + ("end" if clock.now >= 600 else "")

    monkeypatch.setattr(tool, "time", clock)
    monkeypatch.setattr(tool.cluster, "job_server_mode", lambda address: None)
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
    assert tool.submit("http://head:8265", ["python", "train.py"], None) == 0
    assert capsys.readouterr().out.endswith("xend")
    assert sum(t < 60 for t in asked) == 30 and sum(t >= 60 for t in asked) <= 12 and asked[-1] >= 600
