"""Addresses of servers that nobody answers at are named before anything is started."""

import socket
from argparse import Namespace

import pytest

from slime.utils import reachable


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed():
    with socket.socket() as held:  # bound and never listening: refused, and nobody else gets the port
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_every_silent_address_is_named_with_its_flag(listening, closed):
    args = Namespace(teacher=[], teachers={"default": [f"http://{listening}/generate", f"{closed}/generate"]}, rollout_external_engine_addrs=[f"http://{closed}"])
    lines = reachable.silent(args)
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: --rm-url {closed}/generate: nothing answers there from this host (Connection refused)")
    assert lines[1].startswith(f"warning: --rollout-external-engine-addrs http://{closed}: ")


def test_directories_are_no_addresses_and_odd_words_no_crash(listening):
    args = Namespace(teacher=["a=/models/x", "b=http://h:x"], teachers={"a": "/models/x", "b": ["http://h:notaport/generate"]}, rollout_external_engine_addrs=None)
    (line,) = reachable.silent(args)
    assert line.startswith("warning: --teacher b http://h:notaport/generate: ")
    args = Namespace(teacher=[], teachers={"default": [listening]}, rollout_external_engine_addrs=None)
    assert reachable.silent(args) == []
