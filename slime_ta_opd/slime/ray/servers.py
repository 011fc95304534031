"""Every server of a run: student engines and teachers on their slots, started side by side, watched, and stopped.

A server is a Ray actor on its node that owns one SGLang process group. One that died is started again: a teacher at once
and under the eyes of the client, which goes on asking; a student engine before the next rollout (or in the place of this
one, where it was the last), since the driver must send it the current weights. External servers are the client's to wait for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.clients import Clients
from slime.backends.sglang_utils.router import Router
from slime.ray.calls import get
from slime.ray.cluster import NODE_ADDRESS, enter_directory
from slime.ray.placement import Placement
from ta_opd.errors import ConfigError, ServiceError, TaOpdError

_LOOK_SECONDS = 1.0  # between two looks at the servers
_PORT_SECONDS = 15.0  # for an asked-for port to be given back by the server that had it
_CLEAN_SECONDS = 5.0  # for the owner of a dead server to remove its files
_RESTARTS = 3  # starts in a row of one server that may fail


@ray.remote
class ServerActor:
    """One SGLang server, next to where it runs."""

    def __init__(self, args, role: str, name: str, model: str, tp: int, port: int | None):
        from slime.backends.sglang_utils.server import SGLangServer

        enter_directory()
        if args.sglang_host == NODE_ADDRESS:
            args.sglang_host = ray.util.get_node_ip_address()
        log = Path(args.output_dir).absolute() / "logs" / f"{name}.log"
        self.server = SGLangServer.for_run(args, role, model, tp=tp, log_file=log, port=port)

    def start(self, patience: float = 0.0) -> str:
        """Starts the process and returns its address. patience: seconds to wait for an asked-for port."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return self.server.start().url
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def wait_ready(self, timeout: float) -> str:
        """The address once it answers (another one where a port was lost in the meantime)."""
        return self.server.wait_ready(timeout).url

    def alive(self) -> bool:
        return self.server.alive()

    def pids(self) -> list[int]:
        return self.server.pids()

    def stop(self) -> None:
        self.server.stop()


@dataclass
class Managed:
    """A server that this run started: what it takes to start it again. starts: how often it was."""

    role: str  # "student" or "teacher"
    name: str
    model: str
    slots: list[int]
    port: int | None = None
    teacher: str = ""  # the teacher's name, where it is one
    actor: ray.actor.ActorHandle | None = None
    url: str = ""
    starts: int = 0
    failed: int = 0


def in_turn(servers: list[Managed]) -> list[list[Managed]]:
    """Batches that start one after another: SGLang sizes its cache by the memory it finds free, so servers that share a GPU take turns.

    Servers of one batch share no slot; each is in the first batch after all that it shares a slot with.
    """
    batches: list[list[Managed]] = []
    for server in servers:
        behind = [i for i, batch in enumerate(batches) if any(set(server.slots) & set(other.slots) for other in batch)]
        place = behind[-1] + 1 if behind else 0
        if place == len(batches):
            batches.append([])
        batches[place].append(server)
    return batches


class Servers:
    def __init__(self, args, placement: Placement):
        self.args, self.placement = args, placement
        layout = placement.layout
        self.engines = [Managed("student", f"student_{i}", args.hf_checkpoint, s) for i, s in enumerate(layout.engines)]
        self.teachers: dict[str, list[Managed]] = {}
        for name, replicas in layout.teachers.items():
            label = "teacher" if name == "default" else f"teacher_{name}"
            self.teachers[name] = [
                Managed("teacher", f"{label}_{i}", args.teachers[name], s, port=args.teacher_port if i == 0 else None, teacher=name)
                for i, s in enumerate(replicas)
            ]
        self.version = -1
        self.clients: Clients | None = None
        self.router: Router | None = None
        self._serving = 0  # the number of the calls that run now, 0 between them
        self._calls = 0
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> list[str]:
        """Starts all, waits, connects and probes; returns lines to show. Raises ServiceError with the log's end."""
        for batch in in_turn(self._managed()) if self.args.device == "cuda" else [self._managed()]:
            for server in batch:
                self._launch(server)
            self._wait(batch)
        self._connect()
        if not self.args.skip_probe:
            from slime.backends.sglang_utils.probe import probe, table

            checks = probe(self.args, self.clients.student, self.clients.teachers)
            lines = table(checks)
            if any(c.failed for c in checks):
                raise ServiceError("the start-up probe failed:\n" + "\n".join(lines))
        if self._managed():
            self._watcher = threading.Thread(target=self._watch, name="server-watch", daemon=True)
            self._watcher.start()
        return [] if self.args.skip_probe else lines

    def _managed(self) -> list[Managed]:
        return [*self.engines, *(m for replicas in self.teachers.values() for m in replicas)]

    def _launch(self, m: Managed, patience: float = 0.0) -> None:
        options = self.placement.options(m.slots[0], gpus=m.slots)
        m.actor = ServerActor.options(**options).remote(self.args, m.role, m.name, m.model, len(m.slots), m.port)
        m.starts += 1
        m.url = get([m.actor.start.remote(patience)])[0]

    def _wait(self, batch: list[Managed]) -> None:
        for m, url in zip(batch, get([m.actor.wait_ready.remote(self.args.server_start_timeout) for m in batch]), strict=True):
            m.url = url

    def _connect(self) -> None:
        args = self.args
        urls = [m.url for m in self.engines] or list(args.rollout_external_engine_addrs)
        teachers = {name: [m.url for m in self.teachers[name]] if name in self.teachers else target for name, target in args.teachers.items()}
        self.router = Router.for_run(args) if len(urls) > 1 or args.sglang_router_ip else None
        if self.router is not None:
            self._route(urls)
        self.clients = Clients.connect(args, urls, teachers, router=self.router and self.router.url)

    def _route(self, urls: list[str]) -> None:
        """The router, started where it is not running, with the engines of this run behind it."""
        self.router.start()
        if self.engines or self.router.process is not None:  # else engines and router are somebody else's
            self.router.serve(urls)

    def engine_info(self) -> dict:
        """What the weight sender needs to reach the student's engines; differs after any of them was started again."""
        return {
            "urls": list(self.clients.student.urls),
            "starts": [m.starts for m in self.engines],
            "api_key": self.args.sglang_api_key,
            "tp": self.args.rollout_num_gpus_per_engine,
            "slots": [m.slots for m in self.engines],
            "colocated": bool(self.args.colocate and self.args.device == "cuda" and self.engines),
        }

    def set_version(self, version: int) -> None:
        self.version = version
        self.clients.student.weight_version = str(version)

    # ------------------------------------------------------------------ faults

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """While requests to the student run: where its last engine dies, they fail at once."""
        self._calls += 1
        self.clients.student.gone, self._serving = None, self._calls
        try:
            yield
        finally:
            self._serving, self.clients.student.gone = 0, None

    def dead(self, servers: list[Managed]) -> list[Managed]:
        """Those whose process is gone."""
        out = []
        for m in servers:
            try:
                alive = ray.get(m.actor.alive.remote(), timeout=30)
            except Exception:
                alive = False
            if not alive:
                out.append(m)
        return out

    def heal(self, patience: float = 0.0) -> list[str]:
        """Starts dead student engines again; returns their names. They then have their first weights.

        patience: seconds to wait for one to be found dead, where a request has just failed: the processes of a server end
        one after another.
        """
        deadline = time.monotonic() + patience
        while not (dead := self.dead(self.engines)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if dead:
            self._bring_back(dead)
            self.set_version(self.version)
        if self.router is not None and (dead or not self.router.alive()):
            try:
                self._route(list(self.clients.student.urls))
            except TaOpdError as problem:  # requests go to the engines themselves then
                print(f"the router is left out: {problem}", flush=True)
        return [m.name for m in dead]

    def _bring_back(self, engines: list[Managed]) -> None:
        """Starts dead student engines again; one that dies while it starts is started anew, as often in a row as a teacher."""
        client, gone = self.clients.student, engines
        deadline = time.monotonic() + self.args.server_start_timeout
        for left in range(_RESTARTS - 1, -1, -1):
            try:
                for m in gone:
                    self._restart(m, client)
                urls = [m.url for m in engines]
                self._wait(engines)
                for url, m in zip(urls, engines, strict=True):
                    client.move(url, m.url)
                return
            except ServiceError as problem:
                gone = self.dead(engines)
                if not gone or not left or time.monotonic() > deadline:
                    raise
                print(f"{', '.join(m.name for m in gone)} died while starting; starting again: {str(problem).splitlines()[0]}", flush=True)

    def _restart(self, m: Managed, client: SGLangClient) -> None:
        """Starts `m` again; `client` asks at the new address from now on."""
        with contextlib.suppress(Exception):  # it removes the files of the server that died
            ray.get(m.actor.stop.remote(), timeout=_CLEAN_SECONDS)
        with contextlib.suppress(Exception):
            ray.kill(m.actor)
        old = m.url
        self._launch(m, _PORT_SECONDS)
        client.move(old, m.url)

    def _watch(self) -> None:
        """Thread: looks at all servers every second."""
        teachers = [m for replicas in self.teachers.values() for m in replicas]
        while not self._stopping.wait(_LOOK_SECONDS):
            for m in self.dead(teachers):
                if not self._stopping.is_set():
                    self._revive(m)
            call = self._serving
            if call and self.engines and len(self.dead(self.engines)) == len(self.engines) and call == self._serving:
                self.clients.student.gone = "every engine of this run died"

    def _revive(self, m: Managed) -> None:
        """A dead teacher back into service; its client is told where that fails for good."""
        client = self.clients.teachers[m.teacher]
        if m.failed >= _RESTARTS:
            return
        print(f"{m.name} died; starting it again (log {self.args.output_dir}/logs/{m.name}.log)", flush=True)
        began = time.monotonic()
        try:
            self._restart(m, client)
            url = m.url
            self._wait([m])
            client.move(url, m.url)
        except Exception as problem:
            m.failed += 1
            if m.failed >= _RESTARTS and all(other.failed >= _RESTARTS for other in self.teachers[m.teacher]):
                client.gone = f"{m.name} could not be started again {m.failed} times in a row: {problem}"
            print(f"{m.name} did not start: {problem}", flush=True)
            return
        m.failed = 0
        client.back(m.url)
        print(f"{m.name} is back after {time.monotonic() - began:.0f} s", flush=True)

    def stop(self) -> None:
        """Ends every server and waits for it; no client is usable afterwards."""
        self._stopping.set()
        if self.clients is not None:
            self.clients.close()
        if self.router is not None:
            with contextlib.suppress(Exception):
                self.router.stop()
        managed = [m for m in self._managed() if m.actor is not None]
        stops = []
        for m in managed:
            with contextlib.suppress(Exception):
                stops.append(m.actor.stop.remote())
        with contextlib.suppress(Exception):
            ray.wait(stops, num_returns=len(stops), timeout=25)
        for m in managed:
            with contextlib.suppress(Exception):
                ray.kill(m.actor)
