"""One SGLang server as a child of this process: start, wait until it answers, watch, stop. No server outlives its parent."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

import slime
from slime.backends.sglang_utils import cpu_support
from slime.backends.sglang_utils.secret import API_KEY_VARIABLE, Secret
from slime.backends.sglang_utils.server_flags import server_arguments
from slime.backends.sglang_utils.server_topk import AS_LISTS_VARIABLE
from slime.utils import memory
from ta_opd.errors import ConfigError, ServiceError

logger = logging.getLogger(__name__)
_SUPERVISOR = Path(__file__).with_name("supervise.py")
_SCRATCH_ROOT = "/tmp" if os.path.isdir("/tmp") else None
_STOP_SECONDS = 15.0
_LOG_LINES, _LOG_WIDTH, _LOG_BYTES = 25, 240, 65536
_PORT_TRIES = 4  # starts of one server that may lose a port
_PORT_LOST = ("address already in use", "eaddrinuse", "port is already in use")  # of uvicorn, torch's store, SGLang's own checks


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def machine_address(every: str) -> str:
    """An address of this machine for a server that listens on `every` one of them, "0.0.0.0" or "::": the one that packets to others leave
    from, loopback where there is no way out. Not what the host's name stands for, which may be loopback, or of the other family."""
    outside, loopback = (("2001:db8::1", "::1") if ":" in every else ("192.0.2.1", "127.0.0.1"))  # addresses for examples
    try:
        with socket.socket(socket.AF_INET6 if ":" in every else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return loopback


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket that is bound to `port` (0: a free one) and does not listen: until it is closed nobody gets that port by asking for a free one.

    A server of ours can still bind and listen there, since it asks for SO_REUSEADDR as this does. ConfigError when `port` is taken.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ConfigError(f"port {port} on {host} is in use ({error.strerror}); give another one or none") from error
    return held


def check_port(host: str, port: int) -> None:
    """ConfigError when `port` is taken."""
    hold_port(host, port).close()


def remove_leftovers() -> None:
    """Removes files of servers whose supervisor was killed together with the process that had started them."""
    for folder in Path(_SCRATCH_ROOT or tempfile.gettempdir()).glob(f"sgl-*-{_namespace()}-*"):
        pid = folder.name.split("-")[1]
        try:
            if pid.isdigit() and not psutil.pid_exists(int(pid)) and folder.stat().st_uid == os.getuid():
                _remove_scratch(folder)
        except OSError:
            continue


def _namespace() -> int:
    """Number of the space that process ids are counted in: containers may share a /tmp."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _remove_scratch(folder: Path) -> None:
    try:
        for name in (folder / "shared_memory").read_text().split():
            Path(name).unlink(missing_ok=True)
    except OSError:
        pass
    shutil.rmtree(folder, ignore_errors=True)


class SGLangServer:
    """A SGLang server process.

    model_path: HF directory. role: a word for messages and the log. host: address to bind to; other than loopback needs an
    API key, which is made up when none is given. port: None picks a free one. device_env: environment for the server
    (for example CUDA_VISIBLE_DEVICES). extra_args: see `server_flags.server_arguments`. advertise: address that others
    reach this machine by (default: `host`, or `machine_address` when bound to all).
    """

    def __init__(
        self,
        model_path: str,
        role: str = "student",
        host: str = "127.0.0.1",
        port: int | None = None,
        log_file: str | Path | None = None,
        device_env: dict[str, str] | None = None,
        extra_args: Sequence[str] = (),
        *,
        device: str | None = None,
        api_key: str | None = None,
        advertise: str | None = None,
    ):
        self.model_path, self.role, self.host = model_path, role, host
        self.wanted_port, self.port = port, port
        self.log_file = Path(log_file) if log_file else Path(tempfile.gettempdir()) / f"sglang-{role}-{os.getpid()}.log"
        self.device_env, self.extra_args = dict(device_env or {}), [str(a) for a in extra_args]
        self.device = device or ("cpu" if "cpu" in self.extra_args else "cuda")
        if api_key is None and not is_loopback(host):
            api_key = secrets.token_urlsafe(24)
        self.api_key = Secret(api_key) if api_key else None
        if advertise is None:
            advertise = host if host not in ("0.0.0.0", "::") else machine_address(host)
        self.advertise = advertise
        self._process: subprocess.Popen | None = None
        self._held: socket.socket | None = None  # keeps the port until the server has it
        self._log_start, self._scratch = 0, ""

    @classmethod
    def for_run(
        cls,
        args,
        role: str,
        model_path: str,
        *,
        tp: int = 1,
        log_file: str | Path | None = None,
        port: int | None = None,
        device_env: dict[str, str] | None = None,
    ) -> SGLangServer:
        """A server of a run, set up from its flags; made on the node where it is to run."""
        host = getattr(args, "sglang_host", None) or "127.0.0.1"
        if getattr(args, "topk_as_lists", False):
            device_env = {**(device_env or {}), AS_LISTS_VARIABLE: "1"}
        return cls(
            model_path,
            role,
            host,
            port,
            log_file,
            device_env,
            server_arguments(args, role, model_path, tp),
            device=getattr(args, "device", None),
            api_key=getattr(args, "sglang_api_key", None),
        )

    @property
    def url(self) -> str:
        if self.port is None:
            raise ServiceError(f"{self.role} server: no address before start()")
        host = f"[{self.advertise}]" if ":" in self.advertise else self.advertise
        return f"http://{host}:{self.port}"

    def command(self) -> list[str]:
        """The server's own command line; holds no secret."""
        return [
            sys.executable, "-m", "slime.backends.sglang_utils.launch", "--model-path", str(self.model_path),
            "--host", self.host, "--port", str(self.port), *self.extra_args,
        ]  # fmt: skip

    def start(self) -> SGLangServer:
        """Starts the process and returns at once. ConfigError when an asked-for port is taken."""
        if self.alive():
            raise ServiceError(f"{self.role} server is already running at {self.url}")
        self._release_port()
        self._held = hold_port(self.host, self.wanted_port or 0)
        self.port = self._held.getsockname()[1]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers()
        # Short path: SGLang puts its sockets there, and a socket's path holds about 100 characters.
        scratch = self._scratch = tempfile.mkdtemp(prefix=f"sgl-{os.getpid()}-{_namespace()}-", dir=_SCRATCH_ROOT)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            log.write(f"\n$ {' '.join(self.command())}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_SUPERVISOR), str(os.getpid()), scratch, "--", *self.command()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment(scratch), start_new_session=True,
            )  # fmt: skip
        return self

    def wait_ready(self, timeout: float = 900, progress: Callable[[str], None] | None = None) -> SGLangServer:
        """Returns once the server answers. `progress` gets a line about every 5 s.

        ServiceError with the last lines of the log when it dies or does not answer within `timeout` seconds. One that lost a port
        to another process (its own, or one that SGLang chooses by itself) is started again, on another one where none was asked for.
        """
        begin = told = time.monotonic()
        tries = 1
        while True:
            if not self.alive():
                if tries < _PORT_TRIES and self._lost_port():
                    tries += 1
                    self._start_again(tries)
                    continue
                code = self._process.returncode if self._process else None
                raise ServiceError(
                    f"{self.role} server ({self.model_path}) ended while starting (exit code {code}). Last lines of "
                    f"{self.log_file}:\n{self.log_tail()}"
                )
            if self.answers(timeout=2) and self._has_port():
                self._release_port()
                return self
            now = time.monotonic()
            if now - begin > timeout:
                tail = self.log_tail()
                self.stop()
                raise ServiceError(
                    f"{self.role} server ({self.model_path}) did not answer within {timeout:.0f} s (--server-start-timeout). "
                    f"Last lines of {self.log_file}:\n{tail}"
                )
            if progress and now - told > 5:
                told = now
                last = self.log_tail(1).strip()[:160]
                progress(f"{self.role} server starting, {now - begin:.0f} s: {last}")
            time.sleep(0.2)

    def _lost_port(self) -> bool:
        """Whether this start ended because a port was taken."""
        text = self.log_tail(_LOG_BYTES).lower()
        return any(sign in text for sign in _PORT_LOST)

    def _has_port(self) -> bool:
        """Whether it is this server that listens, not whoever has taken its port."""
        for pid in self.pids():
            try:
                found = psutil.Process(pid).net_connections("tcp")
            except psutil.AccessDenied:  # nothing can be seen here: believe it
                return True
            except psutil.Error:
                continue
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in found):
                return True
        return False

    def _start_again(self, tries: int) -> None:
        lost = self.port
        self.start()
        where = f"start {tries} of {_PORT_TRIES}, on port {self.port}"
        line = f"{self.role} server: a port was taken by another process while it started on {lost}; {where}"
        logger.warning("%s", line)
        with self.log_file.open("a") as log:
            log.write(f"{line}\n")

    def _release_port(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def answers(self, timeout: float = 2.0) -> bool:
        """Whether the server replies at all (says nothing about the scheduler behind it)."""
        request = urllib.request.Request(self.url + "/model_info")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {str(self.api_key)}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor, the root of everything this server started."""
        return self._process.pid if self._process else None

    def pids(self) -> list[int]:
        """Process ids of the server and everything below it, the supervisor first."""
        if not self.alive():
            return []
        root = psutil.Process(self._process.pid)
        return [root.pid, *(p.pid for p in root.children(recursive=True))]

    def stop(self) -> None:
        """Ends the server and everything it started, by process id. Does nothing when it is not running."""
        self._release_port()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # the server's parent-death signal ends it, too
                process.wait()
        _remove_scratch(Path(self._scratch))
        self._process = None

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The last lines that this start wrote to the log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, file.tell() - _LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return "(no log)"
        return "\n".join([line[:_LOG_WIDTH] for line in text.splitlines() if line.strip()][-lines:])

    def _environment(self, scratch: str) -> dict[str, str]:
        env = dict(os.environ)
        memory.own_arenas(env)
        env.update(self.device_env)
        env["TMPDIR"] = scratch
        env["PYTHONUNBUFFERED"] = "1"
        # SGLang reads a .bin of torch's legacy format with weights_only=False: a stranger's model directory could run code.
        env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        # Sequences of exactly the model's length are scored; the server wants one token more (see server_flags).
        env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        if os.path.isdir(self.model_path):
            env["HF_HUB_OFFLINE"] = "1"
        env.pop(API_KEY_VARIABLE, None)
        if self.api_key:
            env[API_KEY_VARIABLE] = str(self.api_key)
        package = str(Path(slime.__file__).parent.parent)
        root = str(Path(__import__("ta_opd").__file__).parent.parent)
        paths = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
        env["PYTHONPATH"] = os.pathsep.join([*paths, *(p for p in (package, root) if p not in paths)])
        if self.device == "cpu":
            env = cpu_support.child_environment(env)
            env.setdefault("SLIME_SEEDED_SAMPLING", "1")
            env["OMP_NUM_THREADS"] = self.device_env.get("OMP_NUM_THREADS", env["OMP_NUM_THREADS"])
        return env

    def __enter__(self) -> SGLangServer:
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()
