"""The store of torch.distributed in a server's process: reachable where it was told to be, and nowhere else."""

import subprocess
import sys
from types import SimpleNamespace

from slime.backends.sglang_utils.rendezvous import _meet_on_loopback

SCRIPT = """
import sys
import psutil
from slime.backends.sglang_utils.rendezvous import listen_where_told
if sys.argv[1] == "told":
    listen_where_told()
    listen_where_told()  # a second time does nothing
assert "torch" not in sys.modules
import torch.distributed as dist
from slime.utils.misc import free_port
port = free_port()
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=1, rank=0)
dist.barrier()
print(*{c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port})
second = dist.TCPStore("127.0.0.1", port, is_master=False)
second.set("key", "value")
dist.destroy_process_group()
"""


def addresses(way):
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_rank_0_listens_on_its_own_address_alone():
    assert addresses("told") == ["127.0.0.1"]
    assert addresses("as it is") in (["::"], ["0.0.0.0"])  # what torch does


def test_the_ranks_of_an_open_server_meet_on_loopback(monkeypatch):
    """A store asks for no key."""
    bootstrap = SimpleNamespace(_resolve_dist_init_method=lambda *, server_args, dist_port: f"tcp://{server_args.dist_init_addr or server_args.host}:{dist_port}")
    _meet_on_loopback(bootstrap)
    _meet_on_loopback(SimpleNamespace())  # a version without it stays as it is
    told = bootstrap._resolve_dist_init_method
    for host in ("0.0.0.0", "::", "10.0.0.5"):
        assert told(server_args=SimpleNamespace(host=host, dist_init_addr=None), dist_port=5) == "tcp://127.0.0.1:5"
    assert told(server_args=SimpleNamespace(host="0.0.0.0", dist_init_addr="10.0.0.9"), dist_port=5) == "tcp://10.0.0.9:5"
    monkeypatch.setenv("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "env://")
    assert told(server_args=SimpleNamespace(host="h", dist_init_addr=None), dist_port=5) == "tcp://h:5"
