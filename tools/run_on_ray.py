"""Runs a command on a Ray cluster: submitted to its job server where there is one, else as a direct driver.

  run_on_ray.py --address http://HEAD:8265 -- python train.py ...     an existing cluster's job server
  run_on_ray.py --address HEAD:6379 --wait-nodes 4 -- python train.py ...   a cluster without one, once all its nodes are there
  run_on_ray.py --start-head --port 26379 -- python train.py ...      a head for this command alone, stopped at its end

A head that is started here gets a random token (in a file that only its user can read), its own session directory and its own process group;
ending means ending exactly these processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slime.ray import cluster
from ta_opd.errors import ConfigError, ServiceError, TaOpdError

ALSO_FORWARDED = ("PYTHONPATH", "WANDB_API_KEY")
PORT_FLAGS = ("dashboard-port", "object-manager-port", "node-manager-port", "dashboard-agent-listen-port",
              "dashboard-agent-grpc-port", "metrics-export-port")  # fmt: skip
START_SECONDS = 120.0
LOG_CHARACTERS_A_SECOND = 500_000  # of a job's log, asked for again and again


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--address", help="http(s) address of a job server, or host:port of a cluster for a direct driver")
    p.add_argument("--wait-nodes", type=int, default=1, help="nodes of host:port that must be alive before the command starts")
    p.add_argument("--start-head", action="store_true", help="start a Ray head for this command")
    p.add_argument("--submission-id", help="name of the job; made up when not given")
    p.add_argument("--host", default="127.0.0.1", help="address that a started head binds to")
    p.add_argument("--port", type=int, help="port of a started head")
    for flag in PORT_FLAGS:
        p.add_argument(f"--{flag}", type=int, help="of a started head; default: free")
    p.add_argument("--temp-dir", help="session directory of a started head; default: a new one")
    p.add_argument("--log-dir", default=".", help="directory for the log of a started head")
    p.add_argument("--num-cpus", type=int, help="CPUs that a started head offers; default: all")
    p.add_argument("--least-cpus", type=int, default=0, help="... and this many where the host has fewer")
    p.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    return p


def job_environment() -> dict[str, str]:
    """Variables that a job needs beside what the cluster gives it."""
    return cluster.forwarded() | {name: os.environ[name] for name in ALSO_FORWARDED if os.environ.get(name)}


def submit(address: str, command: list[str], submission_id: str | None) -> int:
    """Submits, prints the job's log as it grows, and returns 0 for a job that succeeded. Ctrl-C stops the job."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    cluster.job_server_mode(address)
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(command), submission_id=submission_id, runtime_env={"env_vars": job_environment()},
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServiceError(f"RAY_ADDRESS={address}: expected a Ray job server, got: {error}") from None
    print(f"job {job} at {address}", flush=True)
    shown, next_look = 0, 0.0
    try:
        while True:
            status = client.get_job_status(job)
            if status.is_terminal() or time.monotonic() >= next_look:
                log = client.get_job_logs(job)  # always the whole of it, so a long one is asked for less often
                print(log[shown:], end="", flush=True)
                shown = len(log)
                next_look = time.monotonic() + min(60.0, shown / LOG_CHARACTERS_A_SECOND)
            if status.is_terminal():
                break
            time.sleep(2)
    except KeyboardInterrupt:
        client.stop_job(job)
        print(f"stopping job {job}", file=sys.stderr)
        return 130
    if status == JobStatus.SUCCEEDED:
        return 0
    info = client.get_job_info(job)
    print(f"job {job} ended as {status.value}: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


def wait_for_nodes(address: str, count: int, seconds: float = 600.0) -> None:
    """Returns once `count` nodes of the cluster are alive. Raises ServiceError after `seconds`.

    A cluster of one node has to be there already; with more it may still be starting.
    """
    import ray

    deadline, alive = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        try:
            head = cluster.check(address)
            with contextlib.suppress(ConnectionError, RuntimeError):
                if not ray.is_initialized():
                    ray.init(head, log_to_driver=False, logging_level="ERROR")
                alive = sum(node["Alive"] for node in ray.nodes())
        except cluster.NoCluster:
            if count == 1:
                raise
        if alive >= count:
            ray.shutdown()
            return
        time.sleep(2)
    raise ServiceError(f"{address}: expected {count} Ray nodes within {seconds:.0f} s, got {alive}")


@contextlib.contextmanager
def ray_head(args: argparse.Namespace):
    """A Ray head in its own process group; yields (its address, address of its job server or None)."""
    ports = {"port": args.port, **{f: getattr(args, f.replace("-", "_")) for f in PORT_FLAGS}}
    given = {k: v for k, v in ports.items() if v is not None}
    if len(set(given.values())) < len(given):
        raise ConfigError(f"ports of the Ray head: expected different ones, got {given}")
    for name, port in given.items():
        if _listens(args.host, port):
            raise ConfigError(f"--{name} {port}: expected a free port, but something listens there already")
    if args.port is None:
        raise ConfigError("--start-head: expected --port")
    ports["dashboard-port"] = ports["dashboard-port"] or _free_port(args.host)
    temp = args.temp_dir or tempfile.mkdtemp(prefix="ray_", dir="/tmp")  # short: Ray puts sockets below it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    token_file = None
    if os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        token_file = os.environ["RAY_AUTH_TOKEN_PATH"] = _write_token(Path(temp))
    cluster.read_settings()
    well = False
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", args.host,
             "--dashboard-host", args.host, "--temp-dir", temp, "--disable-usage-stats"]  # fmt: skip
    words += [w for name, port in ports.items() if port is not None for w in (f"--{name}", str(port))]
    if args.num_cpus or args.least_cpus:
        words += ["--num-cpus", str(args.num_cpus or max(args.least_cpus, os.cpu_count() or 1))]
    log = Path(args.log_dir) / f"ray_head_{args.port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        head = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(lambda: _listens(args.host, args.port), head, log, "the Ray head")
        also = f" RAY_AUTH_TOKEN_PATH={token_file}" if token_file else ""
        print(f"Ray head at {args.host}:{args.port}; others on this host join it by RAY_ADDRESS={args.host}:{args.port}{also}", flush=True)
        server = f"http://{args.host}:{ports['dashboard-port']}"
        yield f"{args.host}:{args.port}", server if _job_server(server) else None
        well = True
    finally:
        _stop(head)
        if token_file:
            Path(token_file).unlink(missing_ok=True)
        if well and not args.temp_dir:  # after an error Ray's logs stay
            shutil.rmtree(temp, ignore_errors=True)


def _write_token(folder: Path) -> str:
    """A file that only this user can read, with a new token."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"auth_token_{os.getpid()}"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(secrets.token_hex(32))
    return str(file)


def _wait(ready, process: subprocess.Popen, log: Path, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None:
            raise ServiceError(f"{what} ended with code {process.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise ServiceError(f"{what} did not answer within {START_SECONDS:.0f} s; see {log}")
        time.sleep(0.2)


def _job_server(address: str, seconds: float = 20.0) -> bool:
    """Whether the head came with a job server; its packages are those of ray[default]."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        return False
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            JobSubmissionClient(address).list_jobs()
            return True
        except (ConnectionError, RuntimeError):
            time.sleep(1)
    return False


def _stop(head: subprocess.Popen) -> None:
    """Ends the head and every process that it started, by their ids."""
    import psutil

    try:
        family = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    head.terminate()  # `ray start --block` ends its node on SIGTERM
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(20)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if head.poll() is None:
        head.kill()
        head.wait()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex((host, port)) == 0


def _free_port(host: str) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script that started us in the background ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        if not command:
            raise ConfigError("expected -- and a command")
        if args.start_head == bool(args.address):
            raise ConfigError("expected either --address or --start-head")
        if args.address:
            if args.address.startswith("http"):
                return submit(args.address, command, args.submission_id)
            wait_for_nodes(args.address, args.wait_nodes)
            os.environ["RAY_ADDRESS"] = args.address
            return _direct(command)
        with ray_head(args) as (address, server):
            os.environ["RAY_ADDRESS"] = address
            if server:
                return submit(server, command, args.submission_id)
            print(f"the Ray head at {address} has no job server (ray[default] is not installed): running the driver directly", flush=True)
            return _direct(command)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _direct(command: list[str]) -> int:
    """The driver as our child: it gets the signal that ends us, and time to stop its servers before the head goes."""
    driver = subprocess.Popen(command)
    try:
        return driver.wait()
    except KeyboardInterrupt:
        driver.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(60)
        if driver.poll() is None:
            driver.kill()
        return 130


if __name__ == "__main__":
    sys.exit(main())
