"""RAY_ADDRESS: what can be joined, and what is said within seconds about what cannot."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray
from ray._raylet import AuthenticationTokenLoader, Config
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from slime.ray import cluster
from ta_opd.errors import ConfigError, ServiceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def user(monkeypatch, tmp_path):
    """This process as one of a user without a token; afterwards Ray's settings are what they were."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.setenv(name, "")  # so that a value set below is taken away again
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()

    def has(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        AuthenticationTokenLoader.instance().reset_cache()

    yield SimpleNamespace(has=has, home=tmp_path)
    monkeypatch.undo()
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def head(monkeypatch):
    """head(version, token) -> address of a server that answers what a driver asks a head first."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    servers = []

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def __init__(self, version, token):
            self.version, self.token = version, token

        def CheckAlive(self, request, context):
            if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing or incorrect")
            return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def start(version=ray.__version__, token=None):
        server = grpc.server(futures.ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(version, token), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def silent_port():
    """(listening socket that never answers, its address)"""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://head:10001", "Ray Client cannot hold a run's driver"), ("http://head:8265", "use a launcher or tools/run_on_ray.py"),
        ("head", "expected host:port"), ("head:gcs", "expected host:port"), ("head:0", "expected host:port"), ("a/b:6379", "expected host:port"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_joined(address, expected, user):
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS={address}: .*{expected}"):
        cluster.check(address)


@pytest.mark.parametrize(("address", "joined"), [(None, False), ("", False), ("local", False), ("auto", True), ("head:6379", True)])
def test_what_names_a_cluster(address, joined):
    assert cluster.is_joined(address) is joined


def test_localhost_is_the_address_that_ray_uses(user):
    assert cluster.head_address("localhost:6379") == cluster.head_address("127.0.0.1:6379") == f"{ray.util.get_node_ip_address()}:6379"


def test_auto(user, monkeypatch):
    from ray._private import services

    listener, started = silent_port()
    with listener:
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda folder: started)
        assert cluster.head_address("auto") == started  # whatever else runs here
    found = {"10.0.0.1:6379"}  # the one that was started has ended
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set(found))
    assert cluster.head_address("auto") == "10.0.0.1:6379"
    found.add("10.0.0.1:7000")
    with pytest.raises(ServiceError, match="expected one Ray cluster on this host, found 10.0.0.1:6379, 10.0.0.1:7000"):
        cluster.head_address("auto")
    found.clear()
    with pytest.raises(ServiceError, match="found none"):
        cluster.head_address("auto")


def test_a_cluster_without_tokens(user, head):
    address = head()
    user.has(RAY_AUTH_TOKEN="of another cluster")
    assert cluster.check(address) == address
    assert os.environ.get("RAY_AUTH_MODE", "disabled") == "disabled"


def test_a_cluster_with_tokens_gets_the_one_that_is_there(user, head):
    address = head(token="secret")
    (user.home / ".ray").mkdir()
    (user.home / ".ray" / "auth_token").write_text("secret")
    assert cluster.check(address) == address
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert cluster.check(address) == address


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "asks for a token and there is none here. Export"), ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_MODE=disabled here"),
    ],
)  # fmt: skip
def test_a_token_that_is_missing_or_wrong(variables, expected, user, head):
    user.has(**variables)
    with pytest.raises(ServiceError, match=expected):
        cluster.check(head(token="secret"))


def test_a_token_mode_that_the_cluster_has_not(user, head):
    user.has(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="mine")
    with pytest.raises(ServiceError, match="runs without tokens, but RAY_AUTH_MODE=token here"):
        cluster.check(head())


def test_another_version_of_ray(user, head):
    with pytest.raises(ServiceError, match=f"expected Ray {ray.__version__}, as here, got 2.1.0"):
        cluster.check(head("2.1.0"))


def test_what_is_no_head(user, monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    listener, address = silent_port()
    with listener, pytest.raises(ServiceError, match=f"RAY_ADDRESS={address}: something listens there, but it is no Ray head"):
        cluster.check(address)


def test_a_private_token_stays_out_of_the_home_directory(user):
    cluster.private_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and not (user.home / ".ray").exists()
    held = os.environ["RAY_AUTH_TOKEN"]
    cluster.private_token()
    assert os.environ["RAY_AUTH_TOKEN"] == held


def test_a_token_that_the_user_has_is_kept(user):
    user.has(RAY_AUTH_TOKEN_PATH=str(user.home / "token"))
    (user.home / "token").write_text("mine")
    AuthenticationTokenLoader.instance().reset_cache()
    cluster.private_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_actors_get_the_driver_directory_and_no_secret(user, monkeypatch, tmp_path):
    for name in ("NCCL_DEBUG", "SLIME_SGLANG_API_KEY", "HF_TOKEN", "TA_OPD_TOKEN", "UNRELATED"):
        monkeypatch.setenv(name, "x")
    monkeypatch.chdir(tmp_path)
    given = cluster.forwarded()
    assert given["NCCL_DEBUG"] == "x" and not {"SLIME_SGLANG_API_KEY", "HF_TOKEN", "TA_OPD_TOKEN", "UNRELATED"} & set(given)
    monkeypatch.chdir("/")
    cluster.enter_directory()
    assert os.getcwd() == "/"  # of a run's own Ray
    monkeypatch.setenv("SLIME_RUN_DIRECTORY", given["SLIME_RUN_DIRECTORY"])
    cluster.enter_directory()
    assert os.getcwd() == str(tmp_path)
    monkeypatch.setenv("SLIME_RUN_DIRECTORY", str(tmp_path / "elsewhere"))
    with pytest.raises(ServiceError, match="expected the directory .*elsewhere of the driver here, too"):
        cluster.enter_directory()


@pytest.fixture
def job_server():
    """job_server(token) -> address of what answers a client's first question as a dashboard does; None: a server of something else."""
    running = []

    def start(token="", garbage=False):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                given = self.headers.get("Authorization")
                assert self.path == "/api/version"
                if garbage:
                    self.wfile.write(b"\0\0@\r\n\r\n")
                    return
                self.send_response(200 if not token or given == f"Bearer {token}" else 403 if given else 401)
                self.end_headers()

            def log_message(self, *words):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_job_server_gets_the_token_that_it_asks_for(user, job_server):
    user.has(RAY_AUTH_TOKEN="secret")
    cluster.job_server_mode(job_server())
    assert "RAY_AUTH_MODE" not in os.environ
    cluster.job_server_mode(job_server("secret"))
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("given", "server", "expected"),
    [
        ({}, {"token": "secret"}, "asks for a token and there is none here"),
        ({"RAY_AUTH_TOKEN": "wrong"}, {"token": "secret"}, "refuses the token of RAY_AUTH_TOKEN"),
        ({}, {"garbage": True}, "expected a Ray job server, but what answers there is none"),
    ],
)
def test_a_job_server_that_refuses(given, server, expected, user, job_server):
    user.has(**given)
    with pytest.raises(ServiceError, match=expected):
        cluster.job_server_mode(job_server(**server))


def test_a_job_server_that_is_not_there(user):
    listener, address = silent_port()
    listener.close()
    words = [sys.executable, str(ROOT / "tools/run_on_ray.py"), "--address", f"http://{address}", "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/slime_ta_opd"})
    assert done.returncode == 2
    assert f"error: RAY_ADDRESS=http://{address}: expected a Ray job server, but nothing answers there" in done.stderr
