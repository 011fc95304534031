"""ray.get for the calls of a run: the actor's own error, or plainly which process died."""

from __future__ import annotations

import errno
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from ta_opd.errors import ServiceError, TaOpdError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError)
_PATIENCE = 5.0  # seconds in which the death behind a broken connection becomes known


class ProcessLost(ServiceError):
    """A process of the run died; the run can start over from its last checkpoint."""


def get(refs: list[ray.ObjectRef]) -> list[Any]:
    """The results. Raises ProcessLost where an actor died, else the actor's own TaOpdError or error of a full disk, else what Ray raised.

    The death of one trainer rank reaches the others as a broken connection, so such errors are held back for a moment.
    """
    try:
        return ray.get(refs)
    except RayError as first:
        cause = first.cause if isinstance(first, RayTaskError) else None
        if isinstance(cause, TaOpdError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:  # Ray's copy of it has neither number nor file
            raise cause from first
        problem = first
    lost = next((p for p in [problem, *_others(refs)] if _is_death(p)), None)
    if lost is not None:
        raise ProcessLost(_describe(lost)) from problem
    raise problem


def _others(refs: list[ray.ObjectRef]) -> list[BaseException]:
    """What the calls failed with that ended by now, or in a moment."""
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_PATIENCE, fetch_local=False)
    problems = []
    for ref in ready:
        try:
            ray.get(ref, timeout=_PATIENCE)
        except RayError as error:
            problems.append(error)
    return problems


def _is_death(error: BaseException) -> bool:
    return isinstance(error, _DEATHS) or (isinstance(error, RayTaskError) and isinstance(error.cause, _DEATHS))


def _describe(error: BaseException) -> str:
    """One line of Ray's long message: what died, its process, and why."""
    if isinstance(error, RayTaskError):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    facts = dict(line.split(": ", 1) for line in lines if ": " in line and line.split(": ", 1)[0] in ("class_name", "pid"))
    name = facts.get("class_name", "").split(".")[0]  # TrainActor.__init__ for one that died while it was made
    who = {"TrainActor": "a trainer rank", "RolloutManager": "the rollout manager", "ServerActor": "the owner of a server"}.get(name, "a process")
    pid = f" (pid {facts['pid']})" if "pid" in facts else ""
    return f"{who}{pid} of this run died: {lines[0].rstrip('.') if lines else type(error).__name__}"
