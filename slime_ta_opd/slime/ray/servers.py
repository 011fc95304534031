"""Every server of a run: student engines and teachers on their slots, started side by side, watched, and stopped.

A server is a Ray actor on its node that owns one SGLang process group. One that died is started again; a student engine
then needs the current weights, which the driver sends. External servers are only watched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import ray

from slime.backends.sglang_utils.client import Clients
from slime.ray.placement import Placement
from ta_opd.errors import ServiceError


@ray.remote
class ServerActor:
    """One SGLang server, next to where it runs."""

    def __init__(self, args, role: str, name: str, model: str, tp: int, port: int | None):
        from slime.backends.sglang_utils.server import SGLangServer

        log = Path(args.output_dir).absolute() / "logs" / f"{name}.log"
        self.server = SGLangServer.for_run(args, role, model, tp=tp, log_file=log, port=port)

    def start(self) -> str:
        self.server.start()
        return self.server.url

    def wait_ready(self, timeout: float) -> None:
        self.server.wait_ready(timeout)

    def alive(self) -> bool:
        return self.server.alive()

    def pids(self) -> list[int]:
        return self.server.pids()

    def stop(self) -> None:
        self.server.stop()


@dataclass
class Managed:
    """A server that this run started: what it takes to start it again."""

    role: str  # "student" or "teacher"
    name: str
    model: str
    slots: list[int]
    port: int | None = None
    actor: ray.actor.ActorHandle | None = None
    url: str = ""


class Servers:
    def __init__(self, args, placement: Placement):
        self.args, self.placement = args, placement
        layout = placement.layout
        self.engines = [Managed("student", f"student_{i}", args.hf_checkpoint, s) for i, s in enumerate(layout.engines)]
        self.teachers: dict[str, list[Managed]] = {}
        for name, replicas in layout.teachers.items():
            label = "teacher" if name == "default" else f"teacher_{name}"
            self.teachers[name] = [
                Managed("teacher", f"{label}_{i}", args.teachers[name], s, port=args.teacher_port if i == 0 else None)
                for i, s in enumerate(replicas)
            ]
        self.version = -1
        self.clients: Clients | None = None

    def start(self) -> list[str]:
        """Starts all, waits, connects and probes; returns lines to show. Raises ServiceError with the log's end."""
        # SGLang sizes its cache by the memory it finds free: servers that share a GPU start one after another
        shared = self.args.device == "cuda" and self.args.teacher_colocate and self.args.colocate
        for batch in [[m] for m in self._managed()] if shared else [self._managed()]:
            for server in batch:
                self._launch(server)
            ray.get([m.actor.wait_ready.remote(self.args.server_start_timeout) for m in batch])
        self._connect()
        if self.args.skip_probe:
            return []
        from slime.backends.sglang_utils.probe import probe, table

        checks = probe(self.args, self.clients.student, self.clients.teachers)
        lines = table(checks)
        failed = [c for c in checks if c.failed]
        if failed:
            raise ServiceError("the start-up probe failed:\n" + "\n".join(lines))
        return lines

    def _managed(self) -> list[Managed]:
        return [*self.engines, *(m for replicas in self.teachers.values() for m in replicas)]

    def _launch(self, m: Managed) -> None:
        options = self.placement.options(m.slots[0], gpus=m.slots)
        m.actor = ServerActor.options(**options).remote(self.args, m.role, m.name, m.model, len(m.slots), m.port)
        m.url = ray.get(m.actor.start.remote())

    def _connect(self) -> None:
        args = self.args
        urls = [m.url for m in self.engines] or list(args.rollout_external_engine_addrs)
        teachers = {name: [m.url for m in self.teachers[name]] if name in self.teachers else target for name, target in args.teachers.items()}
        self.clients = Clients.connect(args, urls, teachers)

    def engine_info(self) -> dict:
        """What the weight sender needs to reach the student's engines."""
        return {
            "urls": list(self.clients.student.urls),
            "api_key": self.args.sglang_api_key,
            "tp": self.args.rollout_num_gpus_per_engine,
            "slots": [m.slots for m in self.engines],
            "colocated": bool(self.args.colocate and self.args.device == "cuda" and self.engines),
        }

    def set_version(self, version: int) -> None:
        self.version = version
        self.clients.student.weight_version = str(version)

    def dead(self) -> list[Managed]:
        """Servers of this run whose process is gone."""
        out = []
        for m in self._managed():
            try:
                alive = ray.get(m.actor.alive.remote(), timeout=30)
            except Exception:
                alive = False
            if not alive:
                out.append(m)
        return out

    def heal(self) -> list[str]:
        """Starts dead servers again and connects anew; returns their names. A student engine then has its first weights."""
        dead = self.dead()
        for m in dead:
            with contextlib.suppress(Exception):
                ray.kill(m.actor)
            self._launch(m)
        for m in dead:
            ray.get(m.actor.wait_ready.remote(self.args.server_start_timeout))
        if dead:
            self.clients.close()
            self._connect()
            self.set_version(self.version)
        return [m.name for m in dead]

    def stop(self) -> None:
        if self.clients is not None:
            self.clients.close()
        for m in self._managed():
            if m.actor is not None:
                with contextlib.suppress(Exception):
                    ray.get(m.actor.stop.remote(), timeout=20)
                ray.kill(m.actor)


