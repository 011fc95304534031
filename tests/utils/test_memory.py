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
