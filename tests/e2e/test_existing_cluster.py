"""A run on a Ray cluster that is there already: a stock head of its own port, joined, used, and left as it was."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import psutil
import pytest
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from tests.e2e.conftest import BASE, TRAIN
from tests.e2e.launching import KEPT, lines

pytestmark = pytest.mark.e2e
TOKEN = "0123456789abcdef" * 4


@contextlib.contextmanager
def ray_start(environment, log, *words):
    """`ray start WORDS`, once it runs; stopped by its process id with what it started."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
    with log.open("w") as out:
        process = subprocess.Popen(words, cwd="/", env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


@pytest.fixture
def head(tmp_path, request):
    """A head as a user with a token in the home directory starts it, in another folder and environment; CPUs: the parameter, else 4."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets are below it
        words = ["--head", "--port", "0", "--num-cpus", str(getattr(request, "param", 4)), "--include-dashboard=false", "--temp-dir", folder]
        with ray_start(environment, tmp_path / "head.log", *words) as process:
            address = Path(folder, "ray_current_cluster").read_text().strip()
            yield SimpleNamespace(process=process, address=address, environment=environment)


def command(task, out, *flags):
    return [sys.executable, str(TRAIN), "--hf-checkpoint", str(task.student), "--prompt-data", str(task.train), "--output-dir", out, *BASE, *flags]


def ours(head):
    """(actors and placement groups that there were, actors that live, placement groups that are held, processes with our names) of the cluster."""
    allowed = [("authorization", f"Bearer {TOKEN}")]
    with grpc.insecure_channel(head.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        actors = gcs_service_pb2_grpc.ActorInfoGcsServiceStub(channel).GetAllActorInfo(
            gcs_service_pb2.GetAllActorInfoRequest(show_dead_jobs=True), timeout=10, metadata=allowed)  # fmt: skip
        groups = gcs_service_pb2_grpc.PlacementGroupInfoGcsServiceStub(channel).GetAllPlacementGroup(
            gcs_service_pb2.GetAllPlacementGroupRequest(), timeout=10, metadata=allowed)  # fmt: skip
    dead, removed = gcs_pb2.ActorTableData.DEAD, gcs_pb2.PlacementGroupTableData.REMOVED
    names = []
    for process in psutil.Process(head.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return (
        len(actors.actor_table_data), len(groups.placement_group_table_data), [a.class_name for a in actors.actor_table_data if a.state != dead],
        [g.state for g in groups.placement_group_table_data if g.state != removed],
        [n for n in names if any(word in n for word in ("TrainActor", "RolloutManager", "ServerActor", "sglang"))],
    )  # fmt: skip


def test_a_run_joins_a_stock_cluster_and_leaves_it_as_it_was(task, servers, head, tmp_path):
    words = command(task, "out", "--num-rollout", "2", "--rm-url", f"{servers.teacher}/generate", "--rollout-external-engine-addrs", servers.student)
    done = subprocess.run(words, cwd=tmp_path, env={**head.environment, "RAY_ADDRESS": head.address}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["rollout_id"] for row in lines(tmp_path / "out" / "metrics.jsonl")] == [0, 1]
    assert (tmp_path / "out" / "DONE").exists()

    assert head.process.poll() is None
    deadline = time.monotonic() + 30
    while any((left := ours(head))[2:]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == (2, 1, [], [], [])  # a trainer rank and the rollout manager were there, and nothing is left


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TA_OPD_SLOW"), reason="set TA_OPD_SLOW=1: about a minute")
@pytest.mark.parametrize("head", [1], indirect=True)
def test_servers_of_a_run_on_two_nodes_are_reached_at_their_nodes(task, head, tmp_path):
    """A second raylet with an address of its own is the second node; the three processes of the run do not fit on either."""
    words = ["--address", head.address, "--node-ip-address", "127.0.0.2", "--num-cpus", "2"]
    run = command(task, "out", "--num-rollout", "2", "--teacher-model", str(task.teacher), "--rollout-max-context-len", "96")
    with ray_start({**head.environment, "RAY_AUTH_MODE": "token"}, tmp_path / "second.log", *words):
        done = subprocess.run(run, cwd=tmp_path, env={**head.environment, "RAY_ADDRESS": head.address}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["rollout_id"] for row in lines(tmp_path / "out" / "metrics.jsonl")] == [0, 1]
    hosts = {re.search(r"--host (\S+)", file.read_text())[1] for file in (tmp_path / "out" / "logs").glob("*_0.log")}
    nodes = {head.address.rpartition(":")[0], "127.0.0.2"}
    assert hosts <= nodes and "127.0.0.1" not in hosts and len(hosts) >= 1


def test_a_run_without_its_cluster_ends_at_once_and_touches_nothing(task, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "DONE").write_text("of an earlier run")
    words = command(task, "out", "--num-rollout", "2", "--rm-url", "http://127.0.0.1:9/generate", "--rollout-external-engine-addrs", "http://127.0.0.1:9")
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"error: RAY_ADDRESS={address}" in done.stderr and "Start it (ray start --head" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["DONE"]
