"""Memory that work took and freed is the system's again, whatever stays between it."""

import subprocess
import sys

import pyarrow as pa
import pytest

from slime.utils import memory

SCRIPT = """
import contextlib, sys
import psutil
from slime.utils import memory

process = psutil.Process()
with memory.returned_after() if sys.argv[1] == "returned" else contextlib.nullcontext():
    before = process.memory_info().rss
    blocks = [b"x" * 60_000 for _ in range(3000)]  # 180 MB
    kept = blocks[::10]
    del blocks
print(process.memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim")
def test_freed_memory_between_kept_arrays_is_returned():
    grown = {way: int(subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True).stdout) for way in ("kept", "returned")}
    assert 18e6 <= grown["returned"] < 30e6 < 150e6 < grown["kept"]  # a tenth is in use


def test_arrow_has_its_pool_again_also_after_an_error():
    before = pa.default_memory_pool().backend_name
    with pytest.raises(RuntimeError, match="inside"):
        with memory.returned_after():
            assert pa.default_memory_pool().backend_name == "system"
            raise RuntimeError("inside")
    assert pa.default_memory_pool().backend_name == before


def test_one_arena_is_for_the_process_that_keeps_rollouts_and_not_for_its_servers(monkeypatch):
    from slime.backends.sglang_utils.server import SGLangServer

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    environment = memory.one_arena()
    assert environment["MALLOC_ARENA_MAX"] == "1"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not set(environment) & set(SGLangServer("model", device="cpu")._environment("/tmp"))
    monkeypatch.delenv("SLIME_ONE_ARENA")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")  # the user's own choice, for everything
    assert memory.one_arena() == {} and SGLangServer("model", device="cpu")._environment("/tmp")["MALLOC_ARENA_MAX"] == "4"


def test_a_containers_limit_counts_where_it_leaves_less(tmp_path):
    """Both versions of control groups; cached files can be given back."""
    whole = memory.available(tmp_path)
    assert whole > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 50000\n")
    assert memory.available(tmp_path) == 350000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(tmp_path) > 350000
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("500000\n")
    (old / "memory.usage_in_bytes").write_text("600000\n")
    (old / "memory.stat").write_text("total_inactive_file 0\n")
    assert memory.available(tmp_path) == 0
