"""Says at once which servers given by address do not answer: a run's own servers take minutes to start before anybody asks them."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from slime.backends.sglang_utils.client import base_url


def addresses(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(flag, address) of every server that somebody else started."""
    for name, target in getattr(args, "teachers", {}).items():
        if not isinstance(target, str):
            yield from ((f"--teacher {name}" if args.teacher else "--rm-url", url) for url in target)
    yield from (("--rollout-external-engine-addrs", url) for url in getattr(args, "rollout_external_engine_addrs", None) or ())


def silent(args: argparse.Namespace, seconds: float = 3.0) -> list[str]:
    """One line for each address that takes no connection from this host. No error: a server may still be starting, or stand where only the
    manager's node reaches it."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda item: _problem(item[1], seconds), given := list(addresses(args))))
    return [
        f"warning: {flag} {url}: nothing answers there from this host ({problem}); the run asks it when its own servers are up"
        for (flag, url), problem in zip(given, found, strict=True) if problem
    ]  # fmt: skip


def _problem(url: str, seconds: float) -> str | None:
    parts = urlsplit(base_url(url))
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
