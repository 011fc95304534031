"""sglang-router in front of the student's engines: one process on loopback for the run, or one that is running already.

Requests go through it and it chooses the engine (cache_aware: prompts with a known prefix to the engine that has it). Weights,
health and aborts go to the engines themselves, and so do requests while the router is away.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from slime.backends.sglang_utils.secret import Secret
from slime.backends.sglang_utils.server import SGLangServer
from slime.utils.misc import free_port
from ta_opd.errors import ServiceError

logger = logging.getLogger(__name__)
POLICIES = ("cache_aware", "round_robin", "random", "power_of_two")
_START_SECONDS, _CALL_SECONDS, _ADD_SECONDS = 60.0, 10.0, 60.0


class RouterProcess(SGLangServer):
    """A router as a child of this process, with no engine behind it yet; it ends with its parent as a server does."""

    def __init__(self, policy: str, port: int | None, log_file: Path, request_timeout: float):
        super().__init__("sglang-router", "router", "127.0.0.1", port, log_file, device="router")
        self.policy, self.request_timeout = policy, request_timeout
        self.metrics_port: int | None = None

    def start(self) -> RouterProcess:
        self.metrics_port = free_port(self.host)  # left alone it is 29000, on every address of the machine
        return super().start()

    def command(self) -> list[str]:
        # retries are the client's, who leaves out the engine that failed; the run itself watches the engines
        return [
            sys.executable, "-m", "sglang_router.launch_router", "--host", self.host, "--port", str(self.port), "--policy", self.policy,
            "--disable-retries", "--disable-health-check", "--worker-startup-check-interval", "1", "--log-level", "warn",
            "--request-timeout-secs", str(max(1, round(self.request_timeout))),
            "--prometheus-host", self.host, "--prometheus-port", str(self.metrics_port),
        ]  # fmt: skip

    def answers(self, timeout: float = 2.0) -> bool:
        try:
            _call(f"{self.url}/workers", timeout=timeout)
        except (OSError, ValueError):
            return False
        return True


class Router:
    """The router of a run and the engines that it has.

    address: ip and port of a router that is running already (both given), else a process is started here; a port alone is
    the port of that process. log_file: of the process. api_key: of the engines.
    """

    def __init__(
        self,
        address: tuple[str | None, int | None],
        log_file: str | Path,
        *,
        policy: str = "cache_aware",
        request_timeout: float = 600.0,
        api_key: str | Secret | None = None,
    ):
        ip, port = address
        self.api_key = Secret(str(api_key)) if api_key else None
        self.process = None if ip else RouterProcess(policy, port, Path(log_file), request_timeout)
        self._address = f"http://{ip}:{port}" if ip else ""
        self.added: list[str] = []  # engines that this run has put behind it

    @classmethod
    def for_run(cls, args) -> Router | None:
        """The router that the flags ask for; None without one."""
        if not (args.use_sglang_router or args.sglang_router_ip):
            return None
        log = Path(args.output_dir).absolute() / "logs" / "router.log"
        return cls((args.sglang_router_ip, args.sglang_router_port), log, policy=args.sglang_router_policy,
                   request_timeout=args.request_timeout, api_key=args.sglang_api_key)  # fmt: skip

    @property
    def url(self) -> str:
        return self.process.url if self.process else self._address

    def start(self) -> Router:
        """Starts the process where it is not running (again); ServiceError where a router does not answer."""
        if self.process is not None and not self.process.alive():
            self.added = []
            self.process.start().wait_ready(_START_SECONDS)
            self.process.wanted_port = self.process.port  # the same address after a restart
        self._workers()
        return self

    def serve(self, urls: Sequence[str]) -> None:
        """Puts exactly these engines of the run behind the router and waits until it has them. ServiceError where it refuses one."""
        for url in set(self.added) - set(urls):
            self._remove(url)
        self.added = [url for url in self.added if url in urls]
        for url in urls:
            if url not in self.added:
                self._do("POST", "/workers", {"url": url, **({"api_key": str(self.api_key)} if self.api_key else {})})
                self.added.append(url)
        deadline = time.monotonic() + _ADD_SECONDS
        while missing := set(urls) - {url for url, worker in self._workers().items() if worker["is_healthy"]}:
            if time.monotonic() > deadline:
                raise ServiceError(f"router at {self.url}: expected it to take {', '.join(sorted(missing))} within {_ADD_SECONDS:.0f} s; "
                                   "look at logs/router.log in the run directory")  # fmt: skip
            time.sleep(0.1)

    def alive(self) -> bool:
        return self.process.alive() if self.process is not None else True

    def stop(self) -> None:
        """Ends the process; takes the run's engines out of a router that goes on."""
        if self.process is not None:
            self.process.stop()
            return
        for url in self.added:
            try:
                self._remove(url)
            except ServiceError as problem:
                logger.warning("%s", problem)

    def _remove(self, url: str) -> None:
        worker = self._workers().get(url)
        if worker is not None:
            self._do("DELETE", f"/workers/{worker['id']}")

    def _workers(self) -> dict[str, dict]:
        return {worker["url"]: worker for worker in self._do("GET", "/workers")["workers"]}

    def _do(self, method: str, path: str, body: dict | None = None) -> dict:
        try:
            return _call(self.url + path, method, body)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read()[:300].decode('utf-8', 'replace')}"
        except (OSError, ValueError) as error:
            problem = str(error)
        raise ServiceError(f"router at {self.url}{path}: {problem}")


def _call(url: str, method: str = "GET", body: dict | None = None, timeout: float = _CALL_SECONDS) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as reply:
        return json.loads(reply.read() or b"{}")
