"""The driver's handle on the rollout manager: how it ends."""

from types import SimpleNamespace

import pytest
import ray

from slime.ray import rollout


class Calls:
    """What the handle asks of Ray, answered by a manager that is busy with `busy`, if anything."""

    def __init__(self, monkeypatch, busy):
        self.busy, self.done = busy, []
        for name in ("wait", "get", "kill"):
            monkeypatch.setattr(rollout.ray, name, getattr(self, name))

    def wait(self, refs, timeout, fetch_local):
        return ([], refs) if refs[0] == self.busy else (refs, [])

    def get(self, ref, timeout):
        self.done.append((ref, timeout))
        if self.busy:
            raise ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")

    def kill(self, actor):
        self.done.append("killed")


@pytest.mark.parametrize("busy", [None, "generate", "start"])
def test_a_manager_in_the_middle_of_something_is_not_waited_for(monkeypatch, busy):
    """Ctrl-C while servers start or a long rollout runs took 30 s more, and ended in a line about an object that is not ready."""
    calls = Calls(monkeypatch, busy)

    def remote(name):
        return SimpleNamespace(remote=lambda *args: name)

    group = rollout.RolloutGroup.__new__(rollout.RolloutGroup)
    group.actor = SimpleNamespace(**{name: remote(name) for name in ("start", "generate", "stop")})
    group._ready = group._long = "start"
    if busy != "start":
        group.begin(3)
    group.stop()
    assert calls.done == [("stop", rollout.BUSY_STOP_SECONDS if busy else rollout.STOP_SECONDS), "killed"]
    assert rollout.BUSY_STOP_SECONDS < rollout.STOP_SECONDS / 5
