"""Joining a Ray cluster that somebody else started: its address, token and version are checked in seconds, where Ray would wait for minutes.

A stock `ray start` asks for a token where its user has one in ~/.ray/auth_token, and a driver that is given an address does
not send it by itself; a driver that sends one to a cluster without tokens cannot talk to its workers. So the cluster is asked
first (NodeInfoGcsService.CheckAlive of Ray's protocol), and this process then does as the cluster does.
"""

from __future__ import annotations

import http.client
import os
import secrets
import socket
import urllib.error
import urllib.request

import ray
from ray._raylet import AuthenticationTokenLoader, Config

from ta_opd.errors import ConfigError, ServiceError

CONNECT_SECONDS = 5.0
KINDS = "host:port of the cluster's head, or auto for the one that runs on this host"
# what the driver's environment gives to its actors where their node was started with another one; no secrets: Ray shows these
_FORWARDED = ("LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NLTK_DATA",
              "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")  # fmt: skip
_FORWARDED_PREFIXES = ("NCCL_", "GLOO_", "SGLANG_", "TORCH_", "PYTORCH_", "TRITON_", "NVTE_", "SLIME_", "TA_OPD_")
_SECRET = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
_DIRECTORY = "SLIME_RUN_DIRECTORY"
NODE_ADDRESS = "node"  # value of args.sglang_host: each server binds to the address that its node has in the cluster


class NoCluster(ServiceError):
    """Nothing answers at the address: a cluster that is being started may do so later."""


def is_joined(address: str | None) -> bool:
    """Whether RAY_ADDRESS's value names a cluster: not where it is empty or `local`."""
    return bool(address) and address != "local"


def check(address: str) -> str:
    """host:port of the head behind RAY_ADDRESS's value `address`, once it answered; this process has its token mode then.

    Raises ConfigError for a value that cannot be joined, NoCluster within CONNECT_SECONDS where nothing answers, ServiceError where it is
    no cluster of this Ray version or the token is missing or wrong.
    """
    head = head_address(address)
    named = f"RAY_ADDRESS={address}"
    named += f" ({head})" if head != address else ""
    host, port = _split(head)
    problem = _answers(host, port, CONNECT_SECONDS)
    if problem is not None:
        raise NoCluster(
            f"{named}: expected a running Ray cluster, but nothing answers there ({problem}). Start it (ray start --head --port {port}), correct "
            "the address, or unset RAY_ADDRESS for a Ray of this run alone"
        )
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return head  # Ray's own connection says what is wrong
    version = _ask(head, None, named)
    if version is None:
        token = _token(named)
        version = _ask(head, token, named)
        if version is None:
            raise _refused(named)
        _use_mode("token")
    else:
        if os.environ.get("RAY_AUTH_MODE", "disabled").lower() != "disabled":
            raise ServiceError(
                f"{named}: the cluster runs without tokens, but RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} here. "
                "Unset RAY_AUTH_MODE, or start the cluster with it"
            )
        _use_mode("disabled")
    if version != ray.__version__:
        raise ServiceError(f"{named}: expected Ray {ray.__version__}, as here, got {version}; use one environment for both")
    return head


def head_address(address: str) -> str:
    """host:port for RAY_ADDRESS's value. Raises ConfigError for what a direct driver cannot join, ServiceError where `auto` finds none or several."""
    if address == "auto":
        from ray._private import services, utils

        started = utils.read_ray_address(None)  # written by `ray start` on each of its machines, not by a run's own Ray
        if started and _answers(*_split(started), 1.0) is None:
            return started
        found = services.find_gcs_addresses()
        if not found:
            raise ServiceError("RAY_ADDRESS=auto: expected a Ray cluster that this host is part of, found none; start it (ray start --head), "
                               "or give host:port of its head")  # fmt: skip
        if len(found) > 1:
            raise ServiceError(f"RAY_ADDRESS=auto: expected one Ray cluster on this host, found {', '.join(sorted(found))}; give one of them")
        return next(iter(found))
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Client cannot hold a run's driver; expected {KINDS}, on a machine of the cluster, "
            "or from elsewhere http://host:8265 of its job server (launchers and tools/run_on_ray.py)"
        )
    if address.startswith(("http://", "https://")):
        raise ConfigError(f"RAY_ADDRESS={address}: a job server takes submitted jobs: use a launcher or tools/run_on_ray.py --address; "
                          f"here expected {KINDS}")  # fmt: skip
    host, port = _split(address)
    if host in ("localhost", "127.0.0.1", "::1"):
        host = ray.util.get_node_ip_address()  # as Ray itself will
    return f"{host}:{port}"


def job_server_mode(address: str) -> None:
    """Gives this process the token mode of the job server at `address` (http...). Raises ServiceError where none answers."""
    named = f"RAY_ADDRESS={address}"
    code = _version_code(address, None, named)
    if code in (401, 403):
        code = _version_code(address, _token(named), named)
        if code in (401, 403):
            raise _refused(named)
        _use_mode("token")
    if code != 200:
        raise ServiceError(f"{named}: expected a Ray job server, got HTTP {code}; give the dashboard's address")


def _version_code(address: str, token: str | None, named: str) -> int:
    """HTTP status of the job server's first question."""
    request = urllib.request.Request(address.rstrip("/") + "/api/version", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as reply:  # through a proxy where one is set, as Ray's client
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = "what answers there is none" if isinstance(error, http.client.HTTPException) else "nothing answers there"
        raise ServiceError(
            f"{named}: expected a Ray job server, but {what} ({str(getattr(error, 'reason', error)).strip()!a:.80}). "
            "It is the dashboard's address, and needs ray[default] on the cluster; without it RAY_ADDRESS=host:6379 runs the driver directly"
        ) from None


def private_token() -> None:
    """For a Ray of this run alone: a token of its own, where the user has none, so that Ray writes none into the home directory.

    A token there would change what every later `ray start` of this user does.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        read_settings()


def read_settings() -> None:
    """Has Ray read token mode and token from the environment anew: it read them when it was imported."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def forwarded() -> dict[str, str]:
    """Variables of this process that actors on a joined cluster get, with the directory that relative paths mean."""
    named = {k: v for k, v in os.environ.items() if k in _FORWARDED or k.startswith(_FORWARDED_PREFIXES)}
    return {k: v for k, v in named.items() if not k.endswith(_SECRET)} | {_DIRECTORY: os.getcwd()}


def enter_directory() -> None:
    """In an actor: goes to the driver's directory, so that both mean the same by a relative path. Raises ServiceError where it is not there."""
    directory = os.environ.get(_DIRECTORY)
    if directory is None:
        return  # of a Ray that the run started itself: it is there already
    try:
        os.chdir(directory)
    except OSError as error:
        raise ServiceError(f"node {ray.util.get_node_ip_address()}: expected the directory {directory} of the driver here, too "
                           f"({error.strerror}); project, models and outputs belong on a file system that all nodes see") from error  # fmt: skip


def _answers(host: str, port: int, seconds: float) -> OSError | None:
    """None where something listens, else what went wrong."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return error
    return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"RAY_ADDRESS={address}: expected {KINDS}")
    return host.strip("[]"), int(port)


def _ask(head: str, token: str | None, named: str) -> str | None:
    """Ray's version of the head; None where it asks for another token than `token`."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(head, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            return stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_SECONDS, metadata=metadata).ray_version
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return None
            raise ServiceError(
                f"{named}: something listens there, but it is no Ray head ({error.code().name.lower()}). Expected {KINDS}; "
                "its port is the one of ray start --port, 6379 where none was given"
            ) from None


def _token(named: str) -> str:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        raise ServiceError(f"{named}: the cluster asks for a token, but RAY_AUTH_MODE=disabled here; unset it")
    loader = AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        raise ServiceError(
            f"{named}: the cluster asks for a token and there is none here. Export the one that it was started with: RAY_AUTH_TOKEN=..., or "
            "RAY_AUTH_TOKEN_PATH=file, or put it into ~/.ray/auth_token"
        )
    return loader.get_raw_token(ignore_auth_mode=True)


def _refused(named: str) -> ServiceError:
    source = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token")
    return ServiceError(
        f"{named}: the cluster refuses the token of {source}. Expected the one that it was started with: "
        "export RAY_AUTH_TOKEN=... (or RAY_AUTH_TOKEN_PATH=file)"
    )


def _use_mode(mode: str) -> None:
    """Token mode of this process; one with tokens that the user has chosen (k8s) stays."""
    if (os.environ.get("RAY_AUTH_MODE", "disabled").lower() == "disabled") != (mode == "disabled"):
        os.environ["RAY_AUTH_MODE"] = mode
        read_settings()
