"""Errors of actors as the driver sees them."""

import errno

import pytest
from ray.exceptions import RayTaskError

from slime.ray import calls
from slime.utils import command
from ta_opd.errors import DataError


def raises(monkeypatch, cause):
    def get(refs):
        raise RayTaskError("RolloutManager.generate", "Traceback ...", cause).as_instanceof_cause()

    monkeypatch.setattr(calls.ray, "get", get)
    monkeypatch.setattr(calls.ray, "wait", lambda refs, **kwargs: ([], refs))


def test_a_full_disk_in_an_actor_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    """Ray's copy of an OSError has no number; it came out as a bug, with a traceback."""
    raises(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "dumps/rollout_000003.partial"))
    monkeypatch.setattr(command, "parse_args", lambda argv: type("Args", (), {"dry_run": False})())
    monkeypatch.setattr(command, "validate", lambda args: args)
    monkeypatch.setattr(command, "with_restarts", lambda train, args: train(args))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert command.main(lambda args: calls.get(["a reference"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: dumps/rollout_000003.partial could not be written: No space left on device; make room, then resume"
    ]


def test_other_errors_of_an_actor(monkeypatch):
    raises(monkeypatch, DataError("a prompt"))
    with pytest.raises(DataError, match="^a prompt$"):
        calls.get(["a reference"])
    raises(monkeypatch, OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(RayTaskError) as caught:
        calls.get(["a reference"])
    assert caught.value.cause.errno == errno.EACCES
