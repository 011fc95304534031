"""Where the ranks of a server meet: torch's store listens on every address of the machine, here it listens on the one it is given; and
SGLang gives it the address that the server is open on, here it is loopback, since the store asks for no key."""

from __future__ import annotations

import functools
import os
import socket
from types import ModuleType
from typing import Any

from slime.backends.sglang_utils.cpu_support.hooks import after_import


def listen_where_told() -> None:
    """For this process, from the moment that it imports torch.distributed: rank 0 of `init_process_group("tcp://HOST:PORT")` listens
    on HOST alone, which is loopback for the ranks of a server. Standard library only, until torch is imported by somebody else."""
    after_import("torch.distributed.rendezvous", _bind_stores)
    after_import("sglang.srt.distributed.bootstrap", _meet_on_loopback)


def _bind_stores(rendezvous: ModuleType) -> None:
    make = rendezvous.TCPStore

    @functools.wraps(make, updated=())
    def bound_store(host_name: str, port: int, *args: Any, is_master: bool = False, **kwargs: Any):
        if is_master and port and kwargs.get("master_listen_fd") is None:
            try:
                family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
                kwargs["master_listen_fd"] = socket.create_server((host_name, port), family=family).detach()  # the store's from now on
            except OSError:
                pass  # an older store of this process has the port and takes this one in, or torch says what is wrong
        return make(host_name, port, *args, is_master=is_master, **kwargs)

    rendezvous.TCPStore = bound_store


def _meet_on_loopback(bootstrap: ModuleType) -> None:
    resolve = getattr(bootstrap, "_resolve_dist_init_method", None)
    if resolve is None:
        return  # another version of SGLang

    @functools.wraps(resolve)
    def on_loopback(*, server_args: Any, dist_port: int) -> str:
        if server_args.dist_init_addr or os.environ.get("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"):
            return resolve(server_args=server_args, dist_port=dist_port)
        return f"tcp://127.0.0.1:{dist_port}"  # all ranks of a server are on one machine

    bootstrap._resolve_dist_init_method = on_loopback
