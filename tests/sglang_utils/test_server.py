"""Start, watch and end of a server: with a stand-in for SGLang's command, so that this takes seconds."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slime.backends.sglang_utils.secret import Secret
from slime.backends.sglang_utils.server import SGLangServer, _namespace, hold_port, is_loopback, machine_address
from slime.backends.sglang_utils.supervise import LOOKS_FOR_A_FILE, SharedMemory
from ta_opd.errors import ConfigError, ServiceError

STAND_IN = Path(__file__).with_name("stand_in.py")


class StandIn(SGLangServer):
    mode = ""

    def command(self):
        return [sys.executable, str(STAND_IN), str(self.port), self.mode]


@pytest.fixture
def server(tmp_path):
    made = []

    def make(mode="", **kwargs):
        one = StandIn("model", log_file=tmp_path / "logs" / "server.log", device="cpu", **kwargs)
        one.mode = mode
        made.append(one)
        return one

    yield make
    for one in made:
        one.stop()


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.05)
    return False


def grown(server, count=4):
    deadline = time.monotonic() + 10
    while len(server.pids()) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = server.pids()
    assert len(pids) >= count
    return pids


@pytest.mark.parametrize("mode", ["", "stubborn"])
def test_stop_ends_everything_it_started_and_nothing_else(server, mode):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        one = server(mode).start().wait_ready(30)
        pids, scratch = grown(one), one._scratch
        assert one.alive() and os.path.isdir(scratch)
        one.stop()
        assert gone(pids, 2) and not one.alive() and not os.path.exists(scratch)
        assert bystander.poll() is None
        one.stop()  # a second time does nothing
    finally:
        bystander.kill()


def test_files_of_a_server_killed_with_its_parent_are_swept_at_the_next_start(server):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = Path(f"/tmp/sgl-{ended.pid}-{_namespace()}-left")
    left.mkdir()
    shared = Path("/dev/shm/sglang_test_left.shm")
    shared.write_text("")
    (left / "shared_memory").write_text(f"{shared}\n")
    one = server().start()
    assert not left.exists() and not shared.exists() and os.path.isdir(one._scratch)


def test_shared_memory_is_known_in_the_round_after_it_appears(tmp_path):
    """Whoever has it may be killed at any moment; looking through every process's maps each time would be dear."""
    import mmap

    folder, looked = tmp_path / "shm", []
    folder.mkdir()
    (folder / "sglang_of_another_server").write_bytes(b"x")
    shared = SharedMemory(tmp_path, str(folder))

    def look(**kwargs):
        shared.look(lambda: looked.append(1) or [os.getpid()], **kwargs)

    look()
    assert not looked and not shared.files
    mine, strangers = folder / "sglang_mine", folder / "sglang_of_a_new_server"
    mine.write_bytes(b"x" * 4096)
    look()  # there, but not mapped yet
    assert len(looked) == 1 and not shared.files
    with mine.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        look()
        assert shared.files == {str(mine)} and (tmp_path / "shared_memory").read_text() == f"{mine}\n"
        look()
        assert len(looked) == 2
        strangers.write_bytes(b"x")
        for _ in range(LOOKS_FOR_A_FILE + 5):
            look()
        assert len(looked) == 2 + LOOKS_FOR_A_FILE and shared.files == {str(mine)}
        look(everything=True)
    assert len(looked) == 3 + LOOKS_FOR_A_FILE and (tmp_path / "shared_memory").read_text() == f"{mine}\n"


def test_it_can_be_started_again(server):
    one = server().start().wait_ready(30)
    first = one.pid
    one.stop()
    one.start().wait_ready(30)
    assert one.alive() and one.pid != first


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_parent(tmp_path, sign):
    script = (
        "import sys, time; sys.path[:0] = {path!r}\n"
        "from tests.sglang_utils.test_server import StandIn, grown\n"
        "one = StandIn('model', log_file={log!r}, device='cpu').start().wait_ready(30)\n"
        "print(*grown(one), one._scratch, flush=True); time.sleep(600)\n"
    ).format(path=sys.path, log=str(tmp_path / "log"))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        *pids, scratch = parent.stdout.readline().split()
        pids = [int(p) for p in pids]
        assert all(psutil.pid_exists(p) for p in pids)
        parent.send_signal(sign)
        parent.wait(10)
        assert gone(pids)
        assert not os.path.exists(scratch)
    finally:
        parent.kill()


def test_killing_the_supervisor_ends_the_server(server):
    one = server().start().wait_ready(30)
    _, main, *below = grown(one)
    try:
        os.kill(one.pid, signal.SIGKILL)
        assert gone([main])  # SGLang's own children end with it by the same signal
        assert not one.alive()
    finally:
        for pid in below:
            os.kill(pid, signal.SIGKILL)


def test_a_server_that_dies_shows_the_end_of_its_log(server):
    with pytest.raises(ServiceError, match="exit code 3.*(?s:.*)no memory left for the KV cache"):
        server("die").start().wait_ready(30)


def test_a_server_that_does_not_answer_is_ended(server):
    one = server("silent").start()
    pids, lines = grown(one), []
    with pytest.raises(ServiceError, match="did not answer within 6 s"):
        one.wait_ready(6, lines.append)
    assert gone(pids) and lines and "starting" in lines[0]


def test_a_port_in_use_is_refused_before_anything_starts(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = server(port=port)
        with pytest.raises(ConfigError, match=f"port {port}.*in use"):
            one.start()
        assert one.pid is None


def test_the_key_is_nowhere_to_be_seen(tmp_path):
    class ShowsItself(SGLangServer):
        def command(self):
            return [sys.executable, str(STAND_IN), str(self.port)]

    server = ShowsItself("model", host="127.0.0.1", api_key="hush-hush", log_file=tmp_path / "log", device="cpu")
    assert "hush" not in " ".join(SGLangServer.command(server) if server.port else []) and "hush" not in repr(vars(server))
    server.start().wait_ready(30)
    try:
        for process in (psutil.Process(p) for p in server.pids()):
            assert "hush" not in " ".join(process.cmdline())
        assert "hush" not in (tmp_path / "log").read_text()
        assert "hush" not in " ".join(SGLangServer.command(server))
    finally:
        server.stop()


def test_addresses_other_than_loopback_get_a_key():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("0.0.0.0")
    assert SGLangServer("m").api_key is None
    open_server = SGLangServer("m", host="0.0.0.0", advertise="10.0.0.1")
    assert len(open_server.api_key) > 20
    assert SGLangServer("m", host="0.0.0.0", api_key="given").api_key == "given"


def test_secret_pickles_and_hides():
    import pickle

    secret = pickle.loads(pickle.dumps(Secret("abc")))
    assert secret == "abc" and repr(secret) == "'***'" and repr({"key": secret}) == "{'key': '***'}" and f"Bearer {secret}" == "Bearer abc"


def takes(port):
    """Whether a process that asks for nothing special gets `port` now."""
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_port_is_held_from_its_choice_until_the_end(server):
    one = server("silent").start()  # a server that has not come to its port yet
    assert not takes(one.port)
    one.stop()
    assert takes(one.port)
    with hold_port("127.0.0.1") as held, pytest.raises(ConfigError, match="in use"), socket.create_server(held.getsockname()):
        hold_port(*held.getsockname())  # one that listens is in nobody's way but ours


@pytest.fixture
def thief():
    """thief(server, times): something else listens on the port of each of its next `times` starts, before the server does."""
    taken = []

    class Thief:
        def __call__(self, server, times):
            plain = server.command

            def command():
                if len(taken) < times and all(t.getsockname()[1] != server.port for t in taken):
                    taken.append(socket.create_server(("127.0.0.1", server.port)))
                return plain()

            server.command = command

        ports = property(lambda self: [t.getsockname()[1] for t in taken])

    yield Thief()
    for listener in taken:
        listener.close()


def test_a_server_whose_port_was_taken_in_between_starts_on_another_one(server, thief):
    one = server()
    thief(one, 1)
    one.start().wait_ready(60)
    assert one.port not in thief.ports and len(thief.ports) == 1 and one.answers()
    said = f"a port was taken by another process while it started on {thief.ports[0]}; start 2 of 4, on port {one.port}"
    assert said in one.log_file.read_text()


def test_a_server_that_lost_a_port_of_its_own_choice_starts_again(server):
    """SGLang chooses ports for its process groups by itself; what it says about a lost one stands far above the end of its log."""
    one = server()
    plain, lost = one.command, "[c10d] The server socket has failed to listen. port: 41000, code: -98, name: EADDRINUSE"
    fails = [sys.executable, "-c", f"import sys; print({lost!r}); print('  at somewhere\\n' * 200); sys.exit(1)"]
    one.command = lambda: fails if not one.log_file.exists() or one.log_file.read_text().count("$ ") < 2 else plain()
    one.start().wait_ready(60)
    assert one.answers() and one.log_file.read_text().count("start 2 of 4") == 1


def test_it_gives_up_where_that_goes_on(server, thief, monkeypatch):
    monkeypatch.setattr("slime.backends.sglang_utils.server._PORT_TRIES", 1)
    one = server()
    thief(one, 9)
    with pytest.raises(ServiceError, match="(?s)ended while starting.*Address already in use"):
        one.start().wait_ready(60)
    assert len(thief.ports) == 1


def test_an_asked_for_port_that_was_taken_in_between_is_named(server, thief):
    with hold_port("127.0.0.1") as held:
        one = server(port=held.getsockname()[1])
    thief(one, 1)
    with pytest.raises(ConfigError, match=f"port {one.wanted_port} on 127.0.0.1 is in use"):
        one.start().wait_ready(60)


def test_who_answers_on_the_port_is_not_taken_for_the_server(server, tmp_path):
    other = server().start().wait_ready(30)
    one = server("silent", port=None).start()
    one.port = other.port
    with pytest.raises(ServiceError, match="did not answer within 1 s"):
        one.wait_ready(1)


@pytest.mark.parametrize("every", ["0.0.0.0", "::"])
def test_a_server_on_every_address_is_reached_at_the_one_that_is_told(every, monkeypatch):
    """uvicorn on "::" takes no IPv4, and a host's name is 127.0.1.1 on many machines, or unknown."""
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.name.invalid")
    assert (":" in machine_address(every)) == (every == "::")
    try:
        socket.create_server((machine_address(every), 0), family=socket.AF_INET6 if every == "::" else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"no such addresses here ({error})")
    server = SGLangServer("m", host=every)
    held = hold_port(every)
    server.port = held.getsockname()[1]

    async def reached():
        listening = await asyncio.get_running_loop().create_server(asyncio.Protocol, every, server.port)
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
        listening.close()

    try:
        asyncio.run(reached())
    finally:
        held.close()
